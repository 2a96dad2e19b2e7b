// Operators' work, recorded to be repeated in one call on the same memory.
#pragma once

#include <torch/custom_class.h>

#include <functional>
#include <vector>

namespace dmc::cpu {

// The caller keeps the memory of all tensors.
class Recording : public torch::CustomClassHolder {
 public:
  // From now on `perform` in this thread records.
  void begin() {
    TORCH_CHECK(!open_, "a recording is open in this thread; end it first");
    work_.clear();
    open_ = this;
  }
  void end() { open_ = nullptr; }
  void replay() {
    for (const auto& work : work_) work();
  }

  template <class Work>
  static void perform(Work work) {
    work();
    if (open_) open_->work_.emplace_back(std::move(work));
  }

 private:
  std::vector<std::function<void()>> work_;
  static inline thread_local Recording* open_ = nullptr;
};

}  // namespace dmc::cpu
