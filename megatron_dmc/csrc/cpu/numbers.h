// float32, in addition to the number types of dmc/platform.h.
#pragma once

#include "dmc/stored.h"

namespace dmc {

inline float to_float(float x) { return x; }
inline void from_float(float x, float& out) { out = x; }

}  // namespace dmc
