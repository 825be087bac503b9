#include "kernels.h"
#include "linear.h"

namespace mmspatialmamba {
namespace ISA {

void scan(const ScanArgs&, const Map&, int64_t, int64_t, float*);
void scan_backward(const ScanArgs&, const ScanGradients&, int64_t, int64_t, float*);
void fusion(const FusionArgs&, const Map&, int64_t, int64_t, float*);
void fusion_backward(const FusionArgs&, const Map&, const Map&, float*, int64_t, int64_t, float*);
void selective_scan(const SelectiveScanArgs&, float*, int64_t, int64_t, float*);
void selective_scan_backward(const SelectiveScanArgs&, const float*, const float*, const Map&, const Map&, float*,
                             float*, float*, int64_t, int64_t, float*);
void depthwise_conv(const ConvArgs&, const Map&, int64_t, int64_t, int64_t, int64_t, float*);
void depthwise_conv_backward(const ConvArgs&, const Map&, const Map&, float*, int64_t, int64_t, float*);
void downsampling_conv(const DownsamplingArgs&, const float* const*, float*);
void downsampling_conv_bfloat16(const DownsamplingArgs&, const BFloat16* const*, BFloat16*);
void downsampling_conv_backward(const DownsamplingArgs&, const float*, int64_t, const float*, const float*, int64_t,
                                int64_t, int64_t, int64_t, float*, float*, float*);
void gated_layer_norm(const NormArgs&, const Matrix&, int64_t, int64_t, float*);
void layer_norm_planes(const NormArgs&, const Matrix&, int64_t, int64_t, float*);
void gated_layer_norm_backward(const NormArgs&, const Matrix&, const Matrix&, const Matrix&, float*, int64_t, int64_t,
                               float*);
void biased_gelu(const GeluArgs&, const Matrix&, int64_t, int64_t, float*);
void biased_gelu_backward(const GeluArgs&, const Matrix&, const Matrix&, const Matrix&, float*, int64_t, int64_t,
                          float*);
void pack_linear(const WeightArgs&, float*, int64_t);
void linear(const LinearArgs<float>&);
void outer(const OuterArgs&, float*);
void pack_linear_bfloat16(const WeightArgs&, BFloat16*, int64_t);
void linear_bfloat16(const LinearArgs<BFloat16>&);

extern const Kernels table;
#define NAME_OF(x) #x
#define NAME(x) NAME_OF(x)
const Kernels table{NAME(ISA),
                    scan,
                    scan_backward,
                    fusion,
                    fusion_backward,
                    selective_scan,
                    selective_scan_backward,
                    depthwise_conv,
                    depthwise_conv_backward,
                    downsampling_conv,
                    downsampling_conv_bfloat16,
                    downsampling_conv_backward,
                    gated_layer_norm,
                    layer_norm_planes,
                    gated_layer_norm_backward,
                    biased_gelu,
                    biased_gelu_backward,
                    kPanel,
                    kTileRows,
                    pack_linear,
                    linear,
                    outer,
                    kTileRowsBFloat16,
                    pack_linear_bfloat16,
                    linear_bfloat16};

#if defined(__AMX_BF16__)
void linear_amx(const LinearArgs<BFloat16>&);

extern const Kernels amx_table;
const Kernels amx_table = [] {
  Kernels kernels = table;
  kernels.instruction_set = "amx";
  kernels.tile_rows_bfloat16 = 32;
  kernels.linear_bfloat16 = linear_amx;
  return kernels;
}();
#endif

}  // namespace ISA
}  // namespace mmspatialmamba
