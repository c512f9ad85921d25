// The functions of torch's stable C ABI that we use (torch/csrc/inductor/aoti_torch/c/shim.h and
// torch/csrc/stable/c/shim.h), declared here so that a build needs no torch, and the little around them.
// Needs torch >= 2.10 at run time. tests/test_extension.py compiles this file beside torch's own headers, which fails
// where a signature differs.
#pragma once
#include <stdint.h>
#include <string.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "sra2_c_api.h"

#ifndef AOTI_TORCH_SHIM  // torch's own headers, in that test only
struct AtenTensorOpaque;
struct DeviceGuardOpaque;
struct TorchLibraryOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using DeviceGuardHandle = DeviceGuardOpaque*;
using TorchLibraryHandle = TorchLibraryOpaque*;
using AOTITorchError = int32_t;
using StableIValue = uint64_t;
struct StableListOpaque;
using StableListHandle = StableListOpaque*;
#endif

extern "C" {
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_float64();
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* ret_dim);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* ret_numel);
AOTITorchError aoti_torch_get_size(AtenTensorHandle tensor, int64_t d, int64_t* ret_size);
AOTITorchError aoti_torch_get_stride(AtenTensorHandle tensor, int64_t d, int64_t* ret_stride);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* ret_dtype);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* ret_device_type);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* ret_device_index);
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle tensor, bool* ret_is_contiguous);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** ret_data_ptr);
AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes_ptr, const int64_t* strides_ptr,
                                        int32_t dtype, int32_t device_type, int32_t device_index,
                                        AtenTensorHandle* ret_new_tensor);
AOTITorchError aoti_torch_create_device_guard(int32_t device_index, DeviceGuardHandle* ret_guard);
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard);
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* k, const char* file, uint32_t line,
                                            TorchLibraryHandle* ret_new_torch_lib);
AOTITorchError torch_library_impl(TorchLibraryHandle self, const char* name,
                                  void (*fn)(StableIValue*, uint64_t, uint64_t), uint64_t extension_build_version);
AOTITorchError torch_list_size(StableListHandle list_handle, size_t* size);
AOTITorchError torch_list_get_item(StableListHandle list_handle, size_t index, StableIValue* element);
AOTITorchError torch_delete_list(StableListHandle list_handle);
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, void (*func)(int64_t, int64_t, void*),
                                  void* ctx);
}

namespace sra2 {

constexpr uint64_t TORCH_ABI = (2ULL << 56) | (10ULL << 48);  // the meaning of torch 2.10's stack values

#define SRA2_OK(call)                                                                  \
  do {                                                                                 \
    if ((call) != 0) throw std::runtime_error("sra2_fast: torch call failed: " #call); \
  } while (0)

// Owns its handle; takes over the one it is given, as the boxed calling convention wants.
struct Tensor {
  AtenTensorHandle handle = nullptr;

  explicit Tensor(StableIValue v) : handle(reinterpret_cast<AtenTensorHandle>(v)) {}
  Tensor(Tensor&& other) noexcept : handle(other.handle) { other.handle = nullptr; }
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (handle) aoti_torch_delete_tensor_object(handle);
  }
  template <class R, class F, class... A>
  R get(F f, A... a) const {
    R v{};
    SRA2_OK(f(handle, a..., &v));
    return v;
  }
  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  int64_t size(int64_t d) const { return get<int64_t>(aoti_torch_get_size, d); }
  int64_t stride(int64_t d) const { return get<int64_t>(aoti_torch_get_stride, d); }
  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype); }
  int32_t device_type() const { return get<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  bool is_contiguous() const { return get<bool>(aoti_torch_is_contiguous); }
  template <class T = void>
  T* data() const {
    return static_cast<T*>(get<void*>(aoti_torch_get_data_ptr));
  }
  bool is_bf16() const { return dtype() == aoti_torch_dtype_bfloat16(); }
  int32_t dtype_code() const { return is_bf16() ? SRA2_BF16 : SRA2_F32; }

  // A new contiguous tensor on the same device.
  Tensor make(int32_t dtype, std::initializer_list<int64_t> sizes) const {
    int64_t strides[8], n = 1;
    for (int i = static_cast<int>(sizes.size()) - 1; i >= 0; --i) {
      strides[i] = n;
      n *= sizes.begin()[i];
    }
    Tensor t(0);
    SRA2_OK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype, device_type(),
                                     device_index(), &t.handle));
    return t;
  }
  // The rows of a (.., D) tensor whose last dimension but one strides evenly (contiguous, or 2-d); null where there is
  // no tensor, or no element in it.
  sra2_rows rows() const {
    if (!handle || numel() == 0) return {};
    return {data(), stride(dim() - 2), dtype_code()};
  }
  StableIValue release() {
    auto v = reinterpret_cast<StableIValue>(handle);
    handle = nullptr;
    return v;
  }
};

// The results of an op, those that are there, as the boxed calling convention wants them: from the bottom of the stack.
template <class... T>
void give_back(StableIValue* stack, T&... results) {
  ((results.handle ? void(*stack++ = results.release()) : void()), ...);
}

// A Tensor[] argument. The list of handles is given up at once: its elements belong to whoever took them.
inline std::vector<Tensor> take_list(StableIValue v) {
  auto list = reinterpret_cast<StableListHandle>(v);
  size_t size = 0;
  SRA2_OK(torch_list_size(list, &size));
  std::vector<Tensor> tensors;
  tensors.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue element{};
    SRA2_OK(torch_list_get_item(list, i, &element));
    tensors.emplace_back(element);
  }
  SRA2_OK(torch_delete_list(list));
  return tensors;
}

struct DeviceGuard {
  DeviceGuardHandle handle = nullptr;
  explicit DeviceGuard(const Tensor& t) { SRA2_OK(aoti_torch_create_device_guard(t.device_index(), &handle)); }
  DeviceGuard(const DeviceGuard&) = delete;
  ~DeviceGuard() { aoti_torch_delete_device_guard(handle); }
};

inline double as_double(StableIValue v) {
  double d;
  memcpy(&d, &v, sizeof d);
  return d;
}
inline int64_t as_int(StableIValue v) { return static_cast<int64_t>(v); }
inline bool as_bool(StableIValue v) { return (v & 0xff) != 0; }

// An op as torch calls it: its arguments lie on the stack in the schema's order, and its results replace them. A tensor
// there is a handle that the op owns.
using Boxed = void (*)(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);

// Implementations for one dispatch key ("CPU", "CUDA") of ops whose schema is defined in Python, sra2_fast/ops/<op>.py.
// Each csrc/*_torch*.cpp has a static one, so that loading the library registers them.
struct Implementations {
  TorchLibraryHandle handle = nullptr;  // never deleted: lives as long as the process
  explicit Implementations(const char* key) {
    SRA2_OK(aoti_torch_library_init_impl("sra2_fast", key, __FILE__, __LINE__, &handle));
  }
  Implementations& add(const char* name, Boxed f) {
    SRA2_OK(torch_library_impl(handle, name, f, TORCH_ABI));
    return *this;
  }
};

// `op: argument must be EXPECTED, got GOT`, the same words as sra2_fast/errors.py; torch turns it into a RuntimeError.
[[noreturn]] inline void must_be(const char* op, const char* argument, const std::string& expected,
                                 const std::string& got) {
  throw std::runtime_error(std::string(op) + ": " + argument + " must be " + expected + ", got " + got);
}

inline std::string sizes_text(const int64_t* sizes, size_t dim) {
  std::string s = "(";
  for (size_t i = 0; i < dim; ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + (dim == 1 ? ",)" : ")");
}

inline std::string sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(static_cast<size_t>(t.dim()));
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = t.size(static_cast<int64_t>(i));
  return sizes_text(sizes.data(), sizes.size());
}

inline std::string dtype_name(int32_t t) {
  if (t == aoti_torch_dtype_float32()) return "torch.float32";
  if (t == aoti_torch_dtype_bfloat16()) return "torch.bfloat16";
  if (t == aoti_torch_dtype_float16()) return "torch.float16";
  if (t == aoti_torch_dtype_float64()) return "torch.float64";
  return "another dtype";
}

// A tensor of exactly these sizes, float32 or bfloat16, unit stride in the last dimension.
inline void check_array(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(static_cast<int64_t>(i)) == sizes.begin()[i];
  if (!same) must_be(op, name, sizes_text(sizes.begin(), sizes.size()), sizes_of(t));
  int32_t dtype = t.dtype();
  if (dtype != aoti_torch_dtype_float32() && dtype != aoti_torch_dtype_bfloat16())
    must_be(op, name, "float32 or bfloat16", dtype_name(dtype));
  int64_t last = t.dim() - 1;
  if (last >= 0 && t.size(last) > 1 && t.stride(last) != 1)
    must_be(op, name, "of stride 1 in the last dimension", std::to_string(t.stride(last)));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  check_array(op, name, t, sizes);
  if (!t.is_contiguous()) must_be(op, name, "contiguous", "a strided tensor");
}

inline void check_ran(const char* op, int32_t error) {
  if (error) throw std::runtime_error(std::string(op) + ": out of memory for the partial sums");
}

}  // namespace sra2
