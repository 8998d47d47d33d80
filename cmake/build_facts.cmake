# What `_C.build_info()` reports, and how pybind11 is found.

# The revision is read when CMake configures; a commit moves .git/logs/HEAD and so configures again.
find_package(Git QUIET)
set(PATHPRUNE_GIT_REVISION "unknown")
if(GIT_FOUND AND EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/.git")
  execute_process(
    COMMAND "${GIT_EXECUTABLE}" rev-parse HEAD
    WORKING_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}"
    OUTPUT_VARIABLE revision
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
    RESULT_VARIABLE no_revision)
  if(NOT no_revision)
    set(PATHPRUNE_GIT_REVISION "${revision}")
  endif()
  if(EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/.git/logs/HEAD")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS .git/logs/HEAD)
  endif()
endif()

function(pathprune_find_pybind11)
  if(NOT pybind11_DIR)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
      OUTPUT_VARIABLE directory
      OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    set(pybind11_DIR "${directory}" CACHE PATH "Where pybind11's CMake package is")
  endif()
  set(PYBIND11_FINDPYTHON ON CACHE BOOL "" FORCE)
  find_package(pybind11 3.0 CONFIG QUIET GLOBAL)
  if(NOT pybind11_FOUND)
    message(FATAL_ERROR "pathprune: pybind11 3 is not installed for ${Python_EXECUTABLE}.\n"
                        "    pip install 'pybind11>=3.0,<4'")
  endif()
endfunction()

function(pathprune_define_build_facts target)
  list(JOIN PATHPRUNE_ISAS "," isas)
  set(cuda_architectures "")
  set(nvcc_version "")
  if(TARGET pathprune_cuda)
    list(JOIN CMAKE_CUDA_ARCHITECTURES "," cuda_architectures)
    set(nvcc_version "${CMAKE_CUDA_COMPILER_VERSION}")
  endif()
  target_compile_definitions(
    ${target}
    PRIVATE PATHPRUNE_VERSION="${PROJECT_VERSION}"
            PATHPRUNE_GIT_REVISION="${PATHPRUNE_GIT_REVISION}"
            PATHPRUNE_TORCH_TARGET=${PATHPRUNE_TORCH_TARGET}
            PATHPRUNE_ISAS="${isas}"
            PATHPRUNE_CUDA_ARCHITECTURES="${cuda_architectures}"
            PATHPRUNE_NVCC_VERSION="${nvcc_version}"
            PATHPRUNE_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
            PATHPRUNE_SANITIZE=$<BOOL:${PATHPRUNE_SANITIZE}>)
endfunction()
