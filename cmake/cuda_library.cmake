# libpathprune_cuda.so: built wherever nvcc is, also where there is neither a GPU nor a CUDA torch,
# so that a machine without a GPU still compiles every kernel.

if(PATHPRUNE_CUDA STREQUAL "OFF")
  return()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(PATHPRUNE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "pathprune: PATHPRUNE_CUDA=ON, but no CUDA compiler (nvcc) was found.")
  endif()
  message(STATUS "nvcc: not found, so the CUDA library is not built (PATHPRUNE_CUDA=AUTO)")
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80-real;90")
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
find_package(CUDAToolkit REQUIRED)

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/ops/*.cu)
add_library(pathprune_cuda MODULE csrc/library_cuda.cpp csrc/library_cuda_sparse.cpp
            csrc/library_cuda_walk.cpp csrc/glue/arguments.cpp csrc/glue/pattern.cpp
            csrc/glue/walk_arguments.cpp ${cuda_sources})
target_compile_definitions(pathprune_cuda PRIVATE USE_CUDA)
target_compile_options(pathprune_cuda
                       PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
set_target_properties(pathprune_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_link_libraries(pathprune_cuda PRIVATE pathprune_flags torch_stable CUDA::cudart_static)
install(TARGETS pathprune_cuda LIBRARY DESTINATION pathprune)
