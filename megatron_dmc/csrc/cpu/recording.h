// Operators' work, recorded to be repeated in one call on the same memory.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dmc::cpu {

// All work that this thread gives to operators between `begin` and `end`. While it is open it notes every operator's
// call as PyTorch's profiler does: 8 ms for a step of 30 layers, where a mode in Python takes 47.
class Recording : public torch::CustomClassHolder {
 public:
  // From now on `perform` in this thread records.
  void begin() {
    TORCH_CHECK(!open_, "a recording is open in this thread; end it first");
    work_.clear();
    calls_.clear();
    memory_.clear();
    foreign_.clear();
    inside_ = false;
    open_ = this;
    watch_ = at::addThreadLocalCallback(
        at::RecordFunctionCallback(&started, &ended).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
  }
  void end() {
    if (open_ != this) return;
    at::removeCallback(watch_);
    open_ = nullptr;
  }
  void replay() {
    for (const auto& work : work_) work();
  }

  // Names of operators that computed and are not recorded.
  std::vector<std::string> foreign() const { return {foreign_.begin(), foreign_.end()}; }

  // Whether the other one has the same calls on the same memory. Each keeps its tensors until `settle`, and as long as
  // these live, equal places are equal tensors.
  bool is_like(const c10::intrusive_ptr<Recording>& other) const { return calls_ == other->calls_; }

  // Forget the calls and keep the memory that they use.
  void settle() {
    std::set<const void*> known;
    for (const Call& call : calls_) {
      for (const c10::IValue& x : call.arguments) {
        if (x.isTensor() && known.insert(x.toTensor().storage().unsafeGetStorageImpl()).second) {
          memory_.push_back(x.toTensor().storage());
        }
      }
    }
    calls_ = {};
  }

  template <class Work>
  static void perform(Work work) {
    work();
    if (open_) open_->work_.emplace_back(std::move(work));
  }

 private:
  struct Call {
    std::string name;
    std::vector<c10::IValue> arguments;

    bool operator==(const Call& other) const {
      return name == other.name && std::equal(arguments.begin(), arguments.end(), other.arguments.begin(),
                                              other.arguments.end(), are_alike);
    }
  };
  // An operator of this extension at work; its own calls of others are its affair.
  struct Own : at::ObserverContext {
    size_t num_before = 0;
  };

  static bool are_alike(const c10::IValue& x, const c10::IValue& y) {
    if (!x.isTensor() || !y.isTensor()) return x.tagKind() == y.tagKind() && x == y;
    const at::Tensor &a = x.toTensor(), &b = y.toTensor();
    return a.const_data_ptr() == b.const_data_ptr() && a.sizes() == b.sizes() && a.strides() == b.strides() &&
           a.scalar_type() == b.scalar_type();
  }

  static std::unique_ptr<at::ObserverContext> started(const at::RecordFunction& function) {
    if (!open_ || open_->inside_) return nullptr;
    if (std::string_view(function.name()).rfind("megatron_dmc_cpu::", 0) != 0) {
      open_->note_foreign(function);
      return nullptr;
    }
    open_->inside_ = true;
    const auto given = function.inputs();
    open_->calls_.push_back({function.name(), std::vector<c10::IValue>(given.begin(), given.end())});
    auto own = std::make_unique<Own>();
    own->num_before = open_->work_.size();
    return own;
  }

  static void ended(const at::RecordFunction& function, at::ObserverContext* context) {
    if (!open_ || !context) return;
    open_->inside_ = false;
    if (open_->work_.size() != static_cast<Own*>(context)->num_before + 1) open_->foreign_.insert(function.name());
  }

  void note_foreign(const at::RecordFunction& function) {
    const auto name = function.operator_name();
    if (!name) return;  // a mark, not an operator
    const auto found = c10::Dispatcher::singleton().findSchema(*name);
    // what a composite one computes, it gives to others
    if (!found || is_view(found->schema()) ||
        found->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) {
      return;
    }
    foreign_.insert(toString(*name));
  }

  static bool is_view(const c10::FunctionSchema& schema) {
    const auto& returns = schema.returns();
    return !returns.empty() && std::all_of(returns.begin(), returns.end(), [](const c10::Argument& x) {
      return x.alias_info() && !x.alias_info()->isWrite();
    });
  }

  std::vector<std::function<void()>> work_;
  std::vector<Call> calls_;
  std::vector<c10::Storage> memory_;
  std::set<std::string> foreign_;
  at::CallbackHandle watch_ = 0;
  bool inside_ = false;
  static inline thread_local Recording* open_ = nullptr;
};

}  // namespace dmc::cpu
