// The core's operations, and what torch calls them.
#pragma once

#include <ATen/ATen.h>

#include <chrono>
#include <string>
#include <vector>

#include "ffreduce.h"

namespace firefly {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

// What getBackendName() answers, whatever name a group was asked for by: torch's flight recorder
// leaves out groups that are called like a backend which records by itself.
constexpr const char* kBackendName = "ffreduce";

constexpr int kKinds = FFR_BARRIER + 1;
// c10d's own spelling, which profiles and tests look for.
constexpr const char* kKindNames[kKinds] = {
    "all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all",
    "gather", "scatter", "send", "recv", "recvAnySource", "barrier"};
constexpr const char* kStatNames[kKinds] = {
    "allreduce", "reduce", "broadcast", "allgather", "reduce_scatter", "alltoall",
    "gather", "scatter", "send", "recv", "recv_any", "barrier"};

// Tags at or above this one are ours: torch's tags are non-negative ints.
constexpr uint32_t kMonitorTag = 0x80000000u;
constexpr uint32_t kMonitorAckTag = 0x80000001u;
// And from here on those of sparse all-reduces, two for each.
constexpr uint32_t kSparseTag = 0xc0000000u;

} // namespace firefly
