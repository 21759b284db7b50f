#include "core/launch.h"

#include "core/observer.h"

namespace dsv4 {
namespace {

const char* symbol_of(const Kernel& kernel, int architecture) {
  if (kernel.images) return kernel.images[architecture].symbol;
  for (const CudaFunction& function : cuda_functions())
    if (function.host_function == kernel.host_function) return function.symbol;
  return nullptr;
}

dsv4_status observe(const Observer& watching, const Kernel& kernel, const LaunchTarget& target,
                    const Geometry& geometry, void** parameters, const uint32_t* sizes, uint32_t count) {
  dsv4_launch record = {};
  record.symbol = symbol_of(kernel, target.device->architecture);
  record.language = kernel.language;
  record.architecture = architecture_of(*target.device).name;
  const dim3 dims[] = {geometry.grid, geometry.block, dim3(geometry.cluster)};  // or the cluster is compiled in
  uint32_t* const fields[] = {record.grid, record.block, record.cluster};
  for (int i = 0; i < 3; ++i) {
    fields[i][0] = dims[i].x;
    fields[i][1] = dims[i].y;
    fields[i][2] = dims[i].z;
  }
  record.dynamic_shared = geometry.dynamic_shared;
  record.parameter_count = count;
  record.parameters = parameters;
  record.parameter_sizes = sizes;
  record.stream = target.stream;
  return watching.call(&record, watching.user);
}

}  // namespace

dsv4_status launch_kernel(Kernel& kernel, const LaunchTarget& target, const Geometry& geometry, void** parameters,
                          const uint32_t* sizes, uint32_t count) {
  if (const Observer* watching = observer()) {
    if (!watching->call) return DSV4_OK;
    const dsv4_status status = observe(*watching, kernel, target, geometry, parameters, sizes, count);
    if (status || watching->emulating) return status;
  }
  const void* handle = kernel.handle[target.device->ordinal].load(std::memory_order_acquire);
  if (!handle)
    if (dsv4_status status = load_kernel(kernel, target.op, *target.device, &handle)) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = geometry.grid;
  config.blockDim = geometry.block;
  config.dynamicSmemBytes = geometry.dynamic_shared;
  config.stream = target.stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = 1;
  if (geometry.cluster > 1) {
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {geometry.cluster, 1, 1};
    config.numAttrs = 2;
  }
  if (cudaError_t error = cudaLaunchKernelExC(&config, handle, parameters))
    return fail_cuda(error, target.op, "cudaLaunchKernelExC");
  return DSV4_OK;
}

dsv4_status launch_aot_kernel(Kernel& kernel, const LaunchTarget& target, dim3 grid, void** parameters,
                              const uint32_t* sizes, uint32_t count) {
  const AotImage& image = kernel.images[target.device->architecture];
  return launch_kernel(kernel, target, {grid, dim3(image.threads, 1, 1), image.dynamic_shared}, parameters, sizes,
                       count);
}

}  // namespace dsv4
