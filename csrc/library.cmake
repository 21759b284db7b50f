# libdsv4_kernels.so, made from its sources. Read by ../CMakeLists.txt.
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

# The architectures, for CMake and as the header that everything includes.
set(aot_arguments "")
if(DSV4_ARCHITECTURES)
  set(aot_arguments --arch ${DSV4_ARCHITECTURES})
endif()
set(generated_dir ${PROJECT_BINARY_DIR}/generated)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS aot/architectures.py aot/generate.py)
execute_process(
  COMMAND
    ${run_python} aot.generate --cmake-architectures --architectures-header ${generated_dir}/architectures.h
    ${aot_arguments}
  OUTPUT_VARIABLE cuda_architectures
  COMMAND_ERROR_IS_FATAL ANY
)

# The aot step: Triton and CuTe DSL kernels to images, and the C++ that embeds and launches them.
file(GLOB_RECURSE aot_sources CONFIGURE_DEPENDS aot/*.py)
if(DSV4_AOT_DIR)
  set(aot_dir ${DSV4_AOT_DIR})
  execute_process(
    COMMAND ${run_python} aot --check --out ${aot_dir} ${aot_arguments}
    COMMAND_ERROR_IS_FATAL ANY
  )
else()
  set(aot_dir ${PROJECT_BINARY_DIR}/aot)
  add_custom_command(
    OUTPUT ${aot_dir}/kernels.h ${aot_dir}/kernels.cpp
    COMMAND ${run_python} aot --out ${aot_dir} ${aot_arguments}
    DEPENDS ${aot_sources} pyproject.toml
    COMMENT "Compiling Triton and CuTe DSL kernels"
    USES_TERMINAL
  )
endif()
add_custom_target(aot DEPENDS ${aot_dir}/kernels.h)

# libdsv4_kernels.so: the C ABI, the CUDA C++ kernels, and the embedded images. The core and the CUDA C++ kernels know
# nothing of the aot step and are compiled beside it.
file(GLOB core_sources CONFIGURE_DEPENDS csrc/core/*.cpp)
add_library(core_objects OBJECT ${core_sources})
target_compile_definitions(core_objects PRIVATE DSV4_VERSION="${PROJECT_VERSION}")
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/*/*.cu)
file(GLOB cpp_sources CONFIGURE_DEPENDS csrc/router/*.cpp csrc/cache/*.cpp csrc/moe/*.cpp csrc/stash/*.cpp)
add_library(cuda_objects OBJECT ${cuda_sources})
set_target_properties(cuda_objects PROPERTIES CUDA_ARCHITECTURES "${cuda_architectures}")
target_compile_options(cuda_objects PRIVATE -Xfatbin=--compress-mode=size -Xcompiler=-Wall,-Wextra)
# char is unsigned on aarch64: images shall be the same whatever machine they are compiled on.
target_compile_options(cuda_objects PRIVATE -Xcudafe=--signed_chars -Xcompiler=-fsigned-char)
set(images_dir ${PROJECT_BINARY_DIR}/images)
# nvcc leaves the PTX that it assembled, for the tests' emulator; none of it is shipped.
set(nvcc_dir ${PROJECT_BINARY_DIR}/nvcc)
foreach(source IN LISTS cuda_sources)
  cmake_path(GET source STEM stem)
  file(MAKE_DIRECTORY ${nvcc_dir}/${stem})
  set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "--keep;--keep-dir=${nvcc_dir}/${stem}")
endforeach()
add_custom_command(
  OUTPUT ${images_dir}/images.cpp ${images_dir}/images.json
  COMMAND
    ${run_python} aot.images --aot ${aot_dir} --nvcc-dir ${nvcc_dir} --out ${images_dir} --nvcc-version
    ${CMAKE_CUDA_COMPILER_VERSION} $<TARGET_OBJECTS:cuda_objects>
  DEPENDS cuda_objects $<TARGET_OBJECTS:cuda_objects> aot ${aot_sources}
  COMMAND_EXPAND_LISTS
  COMMENT "Reading what is in the images"
)
add_library(
  dsv4_kernels
  SHARED
  ${cpp_sources}
  $<TARGET_OBJECTS:core_objects>
  $<TARGET_OBJECTS:cuda_objects>
  ${aot_dir}/kernels.cpp
  ${images_dir}/images.cpp
)
add_dependencies(dsv4_kernels aot)
set_source_files_properties(${aot_dir}/kernels.cpp PROPERTIES COMPILE_OPTIONS -Wa,-I${aot_dir})
foreach(target core_objects cuda_objects dsv4_kernels)
  target_include_directories(
    ${target}
    PRIVATE csrc csrc/include ${generated_dir} ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}
  )
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
endforeach()
target_include_directories(dsv4_kernels PRIVATE ${aot_dir})
foreach(target core_objects dsv4_kernels)
  target_compile_options(${target} PRIVATE ${sanitizers})
endforeach()
target_link_options(dsv4_kernels PRIVATE ${sanitizers})
list(TRANSFORM sanitizers PREPEND "-Xcompiler=" OUTPUT_VARIABLE host_sanitizers)
target_compile_options(cuda_objects PRIVATE ${host_sanitizers})
target_link_libraries(dsv4_kernels PRIVATE dl rt pthread)
target_link_options(
  dsv4_kernels
  PRIVATE
    -Wl,--version-script=${PROJECT_SOURCE_DIR}/csrc/dsv4_kernels.map
    -Wl,--wrap=__cudaRegisterFunction
    -Wl,--no-undefined
    -static-libstdc++
    -static-libgcc
)
set_target_properties(
  dsv4_kernels
  PROPERTIES LINKER_LANGUAGE CXX LINK_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/dsv4_kernels.map
)

# What C++ engines find in the package, and what another build needs to reuse the library.
install(TARGETS dsv4_kernels EXPORT dsv4_kernels LIBRARY DESTINATION lib)
install(DIRECTORY csrc/include/dsv4 DESTINATION include)
set(images_json ${images_dir}/images.json)
install(FILES ${images_json} DESTINATION .)
target_include_directories(dsv4_kernels INTERFACE $<INSTALL_INTERFACE:include>)
install(EXPORT dsv4_kernels NAMESPACE dsv4_kernels:: FILE dsv4_kernels-config.cmake DESTINATION lib/cmake/dsv4_kernels)
include(CMakePackageConfigHelpers)
write_basic_package_version_file(dsv4_kernels-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/dsv4_kernels-config-version.cmake DESTINATION lib/cmake/dsv4_kernels)
configure_file(${PROJECT_SOURCE_DIR}/csrc/dsv4_kernels.pc.in ${PROJECT_BINARY_DIR}/dsv4_kernels.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/dsv4_kernels.pc DESTINATION lib/pkgconfig)
# At install time, when the build has just brought the library up to date with its sources.
set(write_fingerprint ${run_python} aot.sources ${PROJECT_BINARY_DIR}/sources.sha256)
install(CODE "execute_process(COMMAND ${write_fingerprint} COMMAND_ERROR_IS_FATAL ANY)")
install(FILES ${PROJECT_BINARY_DIR}/sources.sha256 DESTINATION lib)
