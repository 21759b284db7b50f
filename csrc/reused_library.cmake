# libdsv4_kernels.so as another build has made it (DSV4_NATIVE_DIR): for a second Python, or on a machine that lacks the
# compilers. Read by ../CMakeLists.txt.
find_package(dsv4_kernels ${PROJECT_VERSION} EXACT CONFIG REQUIRED PATHS ${DSV4_NATIVE_DIR} NO_DEFAULT_PATH)
set(fingerprint ${PROJECT_BINARY_DIR}/sources.sha256)
execute_process(COMMAND ${run_python} aot.sources ${fingerprint} COMMAND_ERROR_IS_FATAL ANY)
file(READ ${fingerprint} expected)
file(READ ${DSV4_NATIVE_DIR}/lib/sources.sha256 found)
if(NOT found STREQUAL expected)
  message(
    FATAL_ERROR
    "DSV4_NATIVE_DIR: ${DSV4_NATIVE_DIR} was made from other sources than these; build it again from this checkout"
  )
endif()
add_library(dsv4_kernels ALIAS dsv4_kernels::dsv4_kernels)
install(DIRECTORY ${DSV4_NATIVE_DIR}/lib ${DSV4_NATIVE_DIR}/include DESTINATION . USE_SOURCE_PERMISSIONS)
set(images_json ${DSV4_NATIVE_DIR}/images.json)
install(FILES ${images_json} DESTINATION .)
