// The device "apart": its memory is the host's, but its tensors refuse to mix with the CPU's.
//
// Every operator is the CPU's own, called with CPU tensors over the same memory: what it writes is
// written there, and what is a view of an argument is a view of it. As on a GPU, a tensor of the
// CPU beside one of the device is an error, but for a number (no dimensions) that is only read.
// What crosses between the two, and what a GPU would have to be waited for, is counted.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

using at::Tensor;

const c10::Device APART(c10::DeviceType::PrivateUse1, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

std::atomic<int64_t> to_device{0}, to_host{0}, waits{0};

bool is_apart(const Tensor& t) {
  return t.defined() && t.device().type() == APART.type();
}

// --- memory -------------------------------------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* data = c10::alloc_cpu(n);
    return {data, data, &c10::free_cpu, APART};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t n) const override {
    default_copy_data(to, from, n);
  }
};
Memory memory;

// Of the host, from which a device copies while it computes.
struct Pinned final : c10::Allocator {
  static inline std::mutex mutex;
  static inline std::set<const void*> held;
  static void release(void* data) {
    std::lock_guard lock(mutex);
    held.erase(data);
    c10::free_cpu(data);
  }
  static bool holds(const void* data) {
    std::lock_guard lock(mutex);
    return held.count(data) > 0;
  }
  c10::DataPtr allocate(size_t n) override {
    void* data = c10::alloc_cpu(n);
    std::lock_guard lock(mutex);
    held.insert(data);
    return {data, data, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override {
    default_copy_data(to, from, n);
  }
};
Pinned pinned;

// A storage of the device `to` over the memory of another, which it keeps alive.
c10::DataPtr borrowed(const c10::Storage& from, c10::Device to) {
  auto drop = [](void* held) { delete static_cast<c10::Storage*>(held); };
  return {const_cast<void*>(from.data()), new c10::Storage(from), drop, to};
}

Tensor shaped(Tensor made, const Tensor& like) {
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      like.sizes(), like.strides(), like.storage_offset());
  return made;
}

Tensor over(c10::Storage storage, c10::DispatchKeySet keys, const Tensor& like) {
  return shaped(
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype()), like);
}

Tensor view_of(const Tensor& base, const Tensor& like) {  // with the base's keys, as it may be older
  return shaped(at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW,
                    c10::Storage(base.storage()), base.key_set(), like.dtype()), like);
}

// --- operators ----------------------------------------------------------------------------------

// The arguments of one operator as the CPU sees them, and its results as the device does.
class Crossing {
 public:
  // Of a tensor of the device, the CPU's over the same memory; others as they are.
  Tensor host(const Tensor& t, bool written = false) {
    if (!is_apart(t)) {
      if (t.defined() && (t.dim() > 0 || written)) stranger_ = t;
      if (t.defined()) strangers_.insert(t.unsafeGetTensorImpl());
      return t;
    }
    for (const auto& [there, here] : pairs_)
      if (there.is_same(t)) return here;
    auto* key = t.storage().unsafeGetStorageImpl();
    auto found = storages_.find(key);
    if (found == storages_.end()) {
      c10::Storage here(c10::Storage::use_byte_size_t(), t.storage().nbytes(),
          borrowed(t.storage(), c10::kCPU), c10::GetAllocator(c10::kCPU), true);
      found = storages_.emplace(key, here).first;
      origins_.emplace(here.unsafeGetStorageImpl(), t);
    }
    pairs_.emplace_back(t, over(found->second, c10::DispatchKeySet(c10::DispatchKey::CPU), t));
    return pairs_.back().second;
  }

  void refuse_strangers(const std::string& name) const {
    TORCH_CHECK(pairs_.empty() || !stranger_.defined(), "Expected all tensors to be on the same ",
        "device, but found at least two, apart:0 and cpu, in ", name);
  }

  // Of a result of the CPU's operator, the device's: an argument, a view of one, or a new tensor.
  Tensor device(const Tensor& t) {
    if (!t.defined() || strangers_.count(t.unsafeGetTensorImpl())) return t;
    for (const auto& [there, here] : pairs_)
      if (here.is_same(t)) return there;
    auto origin = origins_.find(t.storage().unsafeGetStorageImpl());
    if (origin != origins_.end()) return view_of(origin->second, t);
    c10::Storage there(c10::Storage::use_byte_size_t(), t.storage().nbytes(),
        borrowed(t.storage(), APART), &memory, true);
    return over(there, KEYS, t);
  }

  // What the operator gave another size: its memory may have moved.
  void resized() {
    for (const auto& [there, here] : pairs_) {
      if (there.storage().data() != here.storage().data()) {
        there.storage().set_data_ptr(borrowed(here.storage(), APART));
        there.storage().set_nbytes(here.storage().nbytes());
      }
      if (there.sizes() != here.sizes() || there.strides() != here.strides())
        there.unsafeGetTensorImpl()->set_sizes_and_strides(
            here.sizes(), here.strides(), here.storage_offset());
    }
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> pairs_;  // of the device, of the CPU
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages_;
  std::unordered_map<c10::StorageImpl*, Tensor> origins_;
  std::set<c10::TensorImpl*> strangers_;
  Tensor stranger_;
};

// A generator of the device; the CPU's kernels use it while it says that it is theirs.
struct Generator final : at::CPUGeneratorImpl {
  Generator() { be(APART); }
  void be(c10::Device device) {
    device_ = device;
    key_set_ = c10::DispatchKeySet(
        device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::PrivateUse1);
  }
};

// What they give has a size, or is a number, that depends on data: the host has to know it.
const std::set<std::string> WAITING{"aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::_unique2", "aten::unique_dim", "aten::bincount", "aten::repeat_interleave"};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  size_t begin = stack->size() - arguments.size();
  waits += WAITING.count(schema.name());
  Crossing crossing;
  std::vector<Generator*> generators;
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[begin + i];
    const auto* alias = arguments[i].alias_info();
    bool written = alias != nullptr && alias->isWrite();
    if (value.isTensor()) {
      value = crossing.host(value.toTensor(), written);
    } else if (value.isTensorList()) {
      std::vector<Tensor> tensors;
      for (const Tensor& t : value.toTensorVector()) tensors.push_back(crossing.host(t, written));
      value = tensors;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> tensors;
      for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
        tensors.push_back(t ? std::optional(crossing.host(*t)) : std::nullopt);
      value = tensors;
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator() && value.toGenerator().device() == APART) {
      generators.push_back(static_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl()));
      generators.back()->be(c10::kCPU);
    }
  }
  crossing.refuse_strangers(schema.name());
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  for (Generator* generator : generators) generator->be(APART);
  crossing.resized();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = crossing.device(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> tensors;
      for (const Tensor& t : value.toTensorVector()) tensors.push_back(crossing.device(t));
      value = tensors;
    }
  }
}

Tensor empty(at::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::SymIntArrayRef size, at::SymIntArrayRef stride,
    std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size),
      C10_AS_INTARRAYREF_SLOW(stride), &memory, KEYS, c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (!is_apart(from)) {  // without blocking the host's memory is read at once, or pinned
    ++to_device;
    if (!non_blocking) ++waits;
  } else if (!is_apart(to)) {
    ++to_host;
    if (!non_blocking || !Pinned::holds(to.storage().data())) ++waits;
  }
  Crossing crossing;
  at::AutoDispatchBelowADInplaceOrView below;
  Tensor here = crossing.host(to);
  here.copy_(crossing.host(from));
  return to;
}

at::Scalar local_scalar_dense(const Tensor& t) {
  ++to_host;
  ++waits;
  return at::_local_scalar_dense(Crossing().host(t));
}

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    at::SymIntArrayRef stride, at::SymIntArrayRef padding, at::SymIntArrayRef dilation,
    bool transposed, at::SymIntArrayRef output_padding, c10::SymInt groups) {
  Crossing crossing;
  Tensor x = crossing.host(input), w = crossing.host(weight);
  auto b = bias ? std::optional(crossing.host(*bias)) : std::nullopt;
  crossing.refuse_strangers("aten::convolution");
  at::AutoDispatchBelowADInplaceOrView below;
  return crossing.device(at::convolution_symint(
      x, w, b, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input,
    const Tensor& weight, at::SymIntArrayRef stride, at::SymIntArrayRef padding,
    at::SymIntArrayRef dilation, bool transposed, at::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> mask) {
  Crossing crossing;
  Tensor g = crossing.host(grad), x = crossing.host(input), w = crossing.host(weight);
  crossing.refuse_strangers("aten::convolution_backward");
  c10::SymInt channels = transposed ? w.sym_size(1) * groups : w.sym_size(0);
  at::AutoDispatchBelowADInplaceOrView below;
  auto [of_x, of_w, of_b] = at::convolution_backward_symint(g, x, w,
      at::OptionalSymIntArrayRef(channels), stride, padding, dilation, transposed, output_padding,
      groups, mask);
  return {crossing.device(of_x), crossing.device(of_w), crossing.device(of_b)};
}

// --- the device ---------------------------------------------------------------------------------

// There is one device with one stream, on which everything is done at once.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, APART); }
  c10::DeviceType type() const override { return APART.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return APART; }
  c10::Device getDevice() const override { return APART; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const c10::Stream&) const override { ++waits; }
  void synchronizeDevice(c10::DeviceIndex) const override { ++waits; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  bool isPinnedPtr(const void* data) const override { return Pinned::holds(data); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::make_generator<Generator>();
    return generator;
  }
};

const bool registered = [] {
  c10::SetAllocator(APART.type(), &memory);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

int64_t attend_step_by_step(const Tensor&, const Tensor&, const Tensor&,
    const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;  // SDPBackend::math
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attend_step_by_step)
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  // torch has others for devices that it does not know
  for (auto name : {"native_group_norm", "native_layer_norm", "linalg__powsum", "silu_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // as on CUDA
  using at::IntArrayRef, at::Scalar, at::ScalarType;
#define IN_HALF(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define IN_FLOAT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define INTO_FLOAT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define IN_THE_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(IN_HALF)
  AT_FORALL_FP32(IN_FLOAT)
  AT_FORALL_FP32_SET_OPT_DTYPE(INTO_FLOAT)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(IN_THE_WIDEST)
}

TORCH_LIBRARY(apart, m) {
  m.def("counts() -> int[]", [] {
    return std::vector<int64_t>{to_device, to_host, waits};
  });
}
