// The launchers by names that ctypes finds.
#include "selective_scan/cuda.h"
#include "structure_aware_scan/cuda.h"

using namespace mmspatialmamba::cuda;
using mmspatialmamba::Map;

extern "C" {

void emulated_plan(const Size* size, int multiprocessors, int max_tile, Plan* plan) {
  *plan = make_plan(*size, multiprocessors, max_tile);
}

int64_t emulated_plan_blocks(const Size* size, const Plan* plan) { return plan_blocks(*size, *plan); }
int64_t emulated_scan_workspace(const Size* size, const Plan* plan) { return scan_workspace(*size, *plan); }
int64_t emulated_scan_backward_workspace(const Size* size, const Plan* plan) {
  return scan_backward_workspace(*size, *plan);
}

void emulated_structure_aware_scan(const ScanInputs* in, const Plan* plan, const Map* y, float* workspace) {
  structure_aware_scan(*in, *plan, *y, workspace, nullptr);
}

void emulated_structure_aware_scan_backward(const ScanInputs* in, const Plan* plan, const Map* grad,
                                           const ScanGradients* out, float* workspace) {
  structure_aware_scan_backward(*in, *plan, *grad, *out, workspace, nullptr);
}

void emulated_state_fusion(const Size* size, const Plan* plan, const Map* h, const float* taps, const Map* out) {
  state_fusion(*size, *plan, *h, taps, *out, nullptr);
}

void emulated_state_fusion_backward(const Size* size, const Plan* plan, const Map* grad, const Map* h, const float* taps,
                                   const Map* grad_h, float* parameters) {
  state_fusion_backward(*size, *plan, *grad, *h, taps, *grad_h, parameters, nullptr);
}

int64_t emulated_selective_workspace(const SelectiveInputs* in) { return selective_workspace(*in); }
int64_t emulated_selective_backward_workspace(const SelectiveInputs* in) { return selective_backward_workspace(*in); }
void emulated_selective_scan(const SelectiveInputs* in, float* h, float* workspace) {
  selective_scan(*in, h, workspace, nullptr);
}
void emulated_selective_scan_backward(const SelectiveInputs* in, const float* grad, const float* h,
                                     const SelectiveGradients* out, float* workspace) {
  selective_scan_backward(*in, grad, h, *out, workspace, nullptr);
}
}
