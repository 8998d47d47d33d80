# torch_stable: torch's headers and libraries, for code that uses the LibTorch Stable ABI alone.
# torch's own CMake package is not used: it wants a CUDA toolkit of the very release that torch was
# built with, and drags in flags of its own.

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

# find_spec finds torch without the seconds that importing it takes.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.util, os, sys
spec = importlib.util.find_spec('torch')
sys.exit(3) if spec is None else print(os.path.dirname(spec.origin), end='')"
  OUTPUT_VARIABLE TORCH_ROOT
  RESULT_VARIABLE torch_missing)
if(torch_missing)
  message(
    FATAL_ERROR
      "pathprune: torch is not installed for ${Python_EXECUTABLE}.\n"
      "Install torch (2.10 or newer) first, then build against it:\n"
      "    pip install --no-build-isolation .\n"
      "Without --no-build-isolation pip builds in an empty environment, where no torch is.")
endif()
if(NOT EXISTS "${TORCH_ROOT}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "pathprune: the torch in ${TORCH_ROOT} has no Stable ABI headers; "
                      "torch 2.10 or newer is needed.")
endif()
message(STATUS "torch: ${TORCH_ROOT}")

set(PATHPRUNE_TORCH_TARGET 0x020a000000000000)  # the binaries load in torch 2.10 and everything newer
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${TORCH_ROOT}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=${PATHPRUNE_TORCH_TARGET})
target_link_options(torch_stable INTERFACE "LINKER:--no-as-needed")
foreach(library torch torch_cpu c10)
  target_link_libraries(torch_stable INTERFACE "${TORCH_ROOT}/lib/lib${library}.so")
endforeach()
