// The checks of the tensors that an op gets, which its kernels read by pointers: the same for CPU and CUDA.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Optional.h>
#include <c10/util/StringUtil.h>

namespace mmspatialmamba {

using OptionalTensor = c10::optional<at::Tensor>;

// Refuses tensors of another device than the first one's, of other dtypes than the kernels', of wrong shapes, and those
// without strides. All strides will do: what kernels can't read in place is copied for them.
class Checks {
 public:
  Checks(const char* op, const char* first_name, const at::Tensor& first)
      : op_(op), first_name_(first_name), device_(first.device()) {
    check_memory(first_name, first);
  }

  void dimensions(const char* name, const at::Tensor& t, int64_t count) const {
    check_memory(name, t);
    TORCH_CHECK(t.dim() == count, op_, ": ", name, " must have ", count, " dimensions, but has shape ", t.sizes());
  }

  void operator()(const char* name, const at::Tensor& t, at::IntArrayRef sizes) const {
    check_memory(name, t);
    TORCH_CHECK(t.sizes() == sizes, op_, ": ", name, " must have shape (", c10::Join(", ", sizes), "), but has ",
                t.sizes());
  }

  void operator()(const char* name, const OptionalTensor& t, at::IntArrayRef sizes) const {
    if (t) (*this)(name, *t, sizes);
  }

 private:
  void check_memory(const char* name, const at::Tensor& t) const {
    TORCH_CHECK(t.device() == device_, op_, ": ", name, " must be on ", device_, " as ", first_name_, " is, but is on ",
                t.device());
    TORCH_CHECK(t.layout() == at::kStrided, op_, ": ", name, " must be a strided tensor, but its layout is ",
                t.layout());
    const at::ScalarType dtype = t.scalar_type();
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op_, ": ", name,
                " must be float32, bfloat16 or float16 on the native backend, but is ", dtype);
  }

  const char *op_, *first_name_;
  at::Device device_;
};

}  // namespace mmspatialmamba
