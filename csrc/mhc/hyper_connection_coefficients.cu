#include "mhc/launch_seam.cuh"

extern "C" dsv4_status dsv4_hyper_connection_coefficients(const dsv4_hyper_connection_coefficients_args* given,
                                                          dsv4_stream stream) {
  using namespace dsv4;
  Check check("hyper_connection_coefficients");
  const dsv4_hyper_connection_coefficients_args args = check.read(given);
  const int64_t tokens = extent(args.streams, 0), hidden = extent(args.streams, 2);
  check_streams(check, "streams", args.streams, kAny, kAny);
  check.range("streams rows (tokens)", tokens, 0, INT32_MAX);
  check_projection(check, args.fn, args.base, args.scale, kRowsOf<Form::kCoefficients>, 3, hidden, args.epsilon,
                   args.hc_epsilon);
  check_coefficients(check, args.out_pre, args.out_post, args.out_comb, args.post_factor, args.sinkhorn_iterations,
                     tokens);
  check_workspace(check, args.workspace, tokens, hidden);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0) return DSV4_OK;
  Seam seam = {};
  set_streams(seam, args.streams);
  set_projection(seam, args.fn, args.base, args.scale, args.epsilon, args.hc_epsilon);
  set_coefficients(seam, args.out_pre, args.out_post, args.out_comb, args.post_factor, args.sinkhorn_iterations);
  return launch_seam<Form::kCoefficients>(target, seam, args.workspace);
}
