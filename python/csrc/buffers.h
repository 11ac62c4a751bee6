// Tensors to buffers of the core: what may be passed as it is, what must be copied, what is refused.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include <vector>

#include "kinds.h"

namespace firefly {

// c10d numbers its reduce ops as the core does, so they pass through as they are.
static_assert(int(c10d::ReduceOp::SUM) == FFR_SUM && int(c10d::ReduceOp::AVG) == FFR_AVG);
static_assert(int(c10d::ReduceOp::PRODUCT) == FFR_PRODUCT && int(c10d::ReduceOp::MIN) == FFR_MIN);
static_assert(int(c10d::ReduceOp::MAX) == FFR_MAX && int(c10d::ReduceOp::BAND) == FFR_BAND);
static_assert(int(c10d::ReduceOp::BOR) == FFR_BOR && int(c10d::ReduceOp::BXOR) == FFR_BXOR);
static_assert(int(c10d::ReduceOp::PREMUL_SUM) == FFR_PREMUL_SUM);

// How the core sees a tensor's elements.
struct Element {
  int32_t dtype;
  uint64_t units; // core elements per torch element
};

// `moved`: the operation only moves bytes, so a type that the core does not know travels as bytes.
inline Element element(const Tensor& tensor, bool moved, const char* op) {
  using S = at::ScalarType;
  switch (tensor.scalar_type()) {
    case S::Byte: return {FFR_U8, 1};
    case S::Char: return {FFR_I8, 1};
    case S::Short: return {FFR_I16, 1};
    case S::Int: return {FFR_I32, 1};
    case S::Long: return {FFR_I64, 1};
    case S::UInt16: return {FFR_U16, 1};
    case S::UInt32: return {FFR_U32, 1};
    case S::UInt64: return {FFR_U64, 1};
    case S::Bool: return {FFR_BOOL, 1};
    case S::Half: return {FFR_F16, 1};
    case S::BFloat16: return {FFR_BF16, 1};
    case S::Float: return {FFR_F32, 1};
    case S::Double: return {FFR_F64, 1};
    case S::ComplexFloat: return {FFR_COMPLEX64, 1};
    case S::ComplexDouble: return {FFR_COMPLEX128, 1};
    case S::Float8_e4m3fn: return {FFR_F8E4M3FN, 1};
    case S::Float8_e5m2: return {FFR_F8E5M2, 1};
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(
          moved, "ffreduce ", op, ": elements of type ", tensor.scalar_type(), " cannot be reduced");
      return {FFR_U8, uint64_t(tensor.element_size())};
  }
}

inline void checkPlace(const Tensor& tensor, const char* op) {
  TORCH_CHECK_VALUE(tensor.defined(), "ffreduce ", op, ": got an undefined tensor");
  TORCH_CHECK_NOT_IMPLEMENTED(
      tensor.layout() == at::kStrided, "ffreduce ", op, ": only dense tensors are supported, got layout ",
      tensor.layout(), "; call .to_dense() first (allreduce with SUM takes sparse tensors as they are)");
  TORCH_CHECK_VALUE(
      tensor.device().is_cpu(), "ffreduce ", op, ": only CPU tensors are supported, got one on ",
      tensor.device(), "; move it with .cpu()");
}

// A tensor that the operation writes: it must be used in place.
inline const Tensor& writable(const Tensor& tensor, const char* op, bool elementwise) {
  checkPlace(tensor, op);
  const auto format = elementwise ? tensor.suggest_memory_format() : at::MemoryFormat::Contiguous;
  TORCH_CHECK_VALUE(
      tensor.is_contiguous(format) && !tensor.is_conj() && !tensor.is_neg(), "ffreduce ", op,
      ": the tensor that receives the result must be contiguous, got sizes ", tensor.sizes(),
      " strides ", tensor.strides(), "; pass .contiguous() and copy the result back");
  return tensor;
}

// A tensor that the operation only reads: what is not contiguous is copied.
inline Tensor readable(const Tensor& tensor, const char* op) {
  checkPlace(tensor, op);
  return tensor.resolve_conj().resolve_neg().contiguous();
}

// One operation before it is submitted.
struct Call {
  ffr_args args{};
  std::vector<ffr_buf> in, out;
  Tensors keep;    // read by the operation
  Tensors results; // written by it, in the order in which torch wants them back
  const char* name;
  bool moved;
  uint64_t bytesIn = 0, bytesOut = 0;
  at::ScalarType type = at::ScalarType::Undefined;

  Call(ffr_op_kind kind, const char* name) : name(name) {
    args.struct_size = sizeof args;
    args.kind = kind;
    moved = !(kind == FFR_ALLREDUCE || kind == FFR_REDUCE || kind == FFR_REDUCE_SCATTER);
  }

  ffr_buf buffer(const Tensor& tensor, uint64_t elements, uint64_t offset) {
    if (type == at::ScalarType::Undefined) {
      type = tensor.scalar_type();
      args.dtype = element(tensor, moved, name).dtype;
    }
    TORCH_CHECK_VALUE(
        type == tensor.scalar_type(), "ffreduce ", name, ": tensors of different types: ", type,
        " and ", tensor.scalar_type());
    const uint64_t size = tensor.element_size();
    char* base = elements ? static_cast<char*>(tensor.data_ptr()) + offset * size : nullptr;
    return {base, elements * element(tensor, moved, name).units};
  }

  void addIn(const Tensor& tensor, uint64_t elements, uint64_t offset = 0) {
    in.push_back(buffer(tensor, elements, offset));
    bytesIn += elements * tensor.element_size();
  }
  void addOut(const Tensor& tensor, uint64_t elements, uint64_t offset = 0) {
    out.push_back(buffer(tensor, elements, offset));
    bytesOut += elements * tensor.element_size();
  }
  // A tensor that is read.
  void reads(const Tensor& tensor) {
    keep.push_back(readable(tensor, name));
    addIn(keep.back(), keep.back().numel());
  }
  // A tensor that is written.
  void writes(const Tensor& tensor, bool elementwise = false) {
    results.push_back(writable(tensor, name, elementwise));
    addOut(tensor, tensor.numel());
  }
  // A tensor that is read and written in place.
  void updates(const Tensor& tensor) {
    writes(tensor, true);
    addIn(tensor, tensor.numel());
  }
};

} // namespace firefly
