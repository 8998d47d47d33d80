// The fibers that stand for the threads of a block, and what libpathprune_cuda.so asks torch for.

#include <cuda_runtime.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

namespace emulated {

Machine machine;

namespace {

constexpr size_t kStackBytes = 128 << 10;

struct Fiber {
  ucontext_t context;
  bool is_done;
};
Fiber fibers[kMostThreads];
ucontext_t scheduler;
char* stacks = nullptr;
void (*kernel_of_fibers)(const void*);
const void* arguments_of_kernel;
std::minstd_rand chance(1);

void be_thread() {
  kernel_of_fibers(arguments_of_kernel);
  fibers[machine.thread.x].is_done = true;
  ++machine.progress;
}  // on to the scheduler

void begin(unsigned thread) {
  Fiber& fiber = fibers[thread];
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks + kStackBytes * thread;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &scheduler;
  fiber.is_done = false;
  makecontext(&fiber.context, be_thread, 0);
}

// Gives every thread one turn, in any order, but for those of one warp; returns how many have
// ended.
unsigned take_turns(std::vector<unsigned>& order, unsigned starved_warp) {
  std::shuffle(order.begin(), order.end(), chance);
  unsigned ended = 0;
  for (const unsigned thread : order) {
    if (!fibers[thread].is_done && thread / kLanes != starved_warp) {
      machine.thread = {thread};
      swapcontext(&scheduler, &fibers[thread].context);
    }
    ended += fibers[thread].is_done;
  }
  return ended;
}

// Now and then one warp waits until the others can do nothing more without it: it is then as late
// as it can be, and what lacks a barrier comes too early.
void run_block(std::vector<unsigned>& order) {
  constexpr unsigned kNone = kMostThreads;
  constexpr unsigned kSeldom = 8;
  machine.at_barrier = 0;
  for (Meeting& meeting : machine.meetings) meeting.arrived = 0;
  for (const unsigned thread : order) begin(thread);
  unsigned starved_warp = kNone;
  for (int idle = 0; idle < 2;) {
    const uint64_t before = machine.progress;
    if (take_turns(order, starved_warp) == order.size()) return;
    const bool is_idle = machine.progress == before;
    idle = is_idle && starved_warp == kNone ? idle + 1 : 0;
    if (is_idle) {
      starved_warp = kNone;
    } else if (chance() % kSeldom == 0) {
      starved_warp = chance() % (static_cast<unsigned>(order.size() - 1) / kLanes + 1);
    }
  }
  fail("threads wait for others that do not come");
}

}  // namespace

void let_others_run() { swapcontext(&fibers[machine.thread.x].context, &scheduler); }

void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: block %u, thread %u: %s\n", machine.block.x,
               machine.thread.x, what);
  std::abort();
}

void run(void (*kernel)(const void*), const void* arguments, unsigned blocks, unsigned threads) {
  if (threads == 0 || threads > kMostThreads) fail("a block of no size that there is");
  if (stacks == nullptr) {
    stacks = static_cast<char*>(mmap(nullptr, kStackBytes * kMostThreads, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  kernel_of_fibers = kernel;
  arguments_of_kernel = arguments;
  machine.blocks = {blocks};
  machine.threads = {threads};
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  const unsigned first = chance() % blocks;
  for (unsigned i = 0; i < blocks; ++i) {
    machine.block = {(first + i) % blocks};
    run_block(order);
  }
}

}  // namespace emulated

// Tensors are on the CPU, which has no streams.
extern "C" __attribute__((visibility("hidden"))) int aoti_torch_get_current_cuda_stream(
    int, void** stream) {
  *stream = nullptr;
  return 0;
}
