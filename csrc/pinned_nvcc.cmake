# Sets CMAKE_CUDA_COMPILER to the nvcc that pyproject.toml pins and the build environment holds, unless the user chose one
# (-DCMAKE_CUDA_COMPILER= or CUDACXX). A toolkit that happens to be on the machine is not taken.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  execute_process(
    COMMAND
      ${Python_EXECUTABLE} -c
      "import importlib.metadata as m; print(next(f.locate() for f in m.files('nvidia-cuda-nvcc') if f.name == 'nvcc'), end='')"
    OUTPUT_VARIABLE pinned_nvcc
    ERROR_VARIABLE error
    RESULT_VARIABLE failed
  )
  if(failed)
    message(
      FATAL_ERROR
      "No nvcc: install the build requirements of pyproject.toml (pip does it when it builds), or name "
      "a CUDA compiler with -DCMAKE_CUDA_COMPILER=.\n${error}"
    )
  endif()
  get_filename_component(CMAKE_CUDA_COMPILER ${pinned_nvcc} REALPATH)
  get_filename_component(toolkit ${CMAKE_CUDA_COMPILER}/../.. ABSOLUTE)
  set(CMAKE_CUDA_COMPILER ${CMAKE_CUDA_COMPILER} CACHE FILEPATH "CUDA compiler")
  # These packages keep libraries in lib, where nvcc's own profile looks in lib64.
  set(CMAKE_CUDA_FLAGS_INIT "-L${toolkit}/lib")
endif()
