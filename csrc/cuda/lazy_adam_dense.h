// The dense step's part in lazy_adam_steps.
#pragma once
#include "../contract.h"

namespace fastbert::cuda {

// Whether a step is one of lazy_adam_dense(): all rows step, and no row differs from the others.
bool lazy_adam_is_dense(const LazyAdamStep& p);

// Starts those of the steps that are dense, in one launch or as few as take all of them. Nothing is changed
// where `is_bad`, on the device, is not 0; null: 0.
int lazy_adam_dense(const LazyAdamStep* steps, int64_t count, const int32_t* is_bad, void* stream);

// Raises the counts that `step` points to by so much, on the device; not where found_inf is set, and only
// where `only_if` is not 0; null: 1.
int lazy_adam_count(const LazyAdamStep* steps, int64_t count, float by, const int32_t* only_if, void* stream);

}  // namespace fastbert::cuda
