#include "mhc/launch_seam.cuh"

extern "C" dsv4_status dsv4_hyper_connection_head(const dsv4_hyper_connection_head_args* given, dsv4_stream stream) {
  using namespace dsv4;
  Check check("hyper_connection_head");
  const dsv4_hyper_connection_head_args args = check.read(given);
  const int64_t tokens = extent(args.streams, 0), hidden = extent(args.streams, 2);
  check_streams(check, "streams", args.streams, kAny, kAny);
  check.range("streams rows (tokens)", tokens, 0, INT32_MAX);
  check_projection(check, args.fn, args.base, args.scale, kRowsOf<Form::kHead>, 1, hidden, args.epsilon,
                   args.hc_epsilon);
  check_norm(check, args.norm_weight, args.norm_unrounded, hidden);
  check_layer_input(check, "out_hidden", args.out_hidden, tokens, hidden);
  check_workspace(check, args.workspace, tokens, hidden);
  LaunchTarget target;
  if (dsv4_status status = check.open(stream, &target)) return status;

  if (tokens == 0) return DSV4_OK;
  Seam seam = {};
  set_streams(seam, args.streams);
  set_projection(seam, args.fn, args.base, args.scale, args.epsilon, args.hc_epsilon);
  set_layer_input(seam, args.norm_weight, args.out_hidden, args.norm_unrounded);
  return launch_seam<Form::kHead>(target, seam, args.workspace);
}
