// What a group and its Works share: counters for `firefly.stats()`, extensions of the time limit, hooks.
#pragma once

#include <torch/csrc/distributed/c10d/Hooks.hpp>

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "kinds.h"

namespace firefly {

// What `firefly.stats()` shows per kind of operation.
struct Counter {
  uint64_t calls = 0;
  uint64_t bytes = 0;           // of the larger side of the operation on this rank
  double seconds = 0;           // during which at least one operation of the kind was in flight
  uint64_t inFlight = 0;
  steady_clock::time_point since;
};

class Counters {
 public:
  void started(int kind, uint64_t bytes) {
    std::lock_guard<std::mutex> guard(mutex_);
    Counter& c = counters_[kind];
    c.calls++;
    c.bytes += bytes;
    if (c.inFlight++ == 0) c.since = steady_clock::now();
  }
  void ended(int kind) {
    std::lock_guard<std::mutex> guard(mutex_);
    Counter& c = counters_[kind];
    if (--c.inFlight == 0)
      c.seconds += std::chrono::duration<double>(steady_clock::now() - c.since).count();
  }
  Counter read(int kind) {
    std::lock_guard<std::mutex> guard(mutex_);
    return counters_[kind];
  }

 private:
  std::mutex mutex_;
  Counter counters_[kKinds];
};

// Extensions of the time limit that last until the first operation that got one is complete
// (c10d::Backend::addEphemeralTimeout).
class Extensions {
 public:
  void add(milliseconds by) {
    std::lock_guard<std::mutex> guard(mutex_);
    active_.push_back({by, false});
  }
  // The extension for an operation that begins now, and the ids that end with it.
  milliseconds take(std::vector<uint64_t>& ids) {
    std::lock_guard<std::mutex> guard(mutex_);
    milliseconds total{0};
    for (auto& e : active_) {
      total += e.by;
      if (!e.owned) {
        e.owned = true;
        ids.push_back(e.id = next_++);
      }
    }
    return total;
  }
  void drop(const std::vector<uint64_t>& ids) {
    std::lock_guard<std::mutex> guard(mutex_);
    for (uint64_t id : ids)
      for (auto it = active_.begin(); it != active_.end(); ++it)
        if (it->owned && it->id == id) {
          active_.erase(it);
          break;
        }
  }

 private:
  struct Extension {
    milliseconds by;
    bool owned;
    uint64_t id = 0;
  };
  std::mutex mutex_;
  std::vector<Extension> active_;
  uint64_t next_ = 1;
};

// What callers want to be told about (c10d/Hooks.hpp says what each is for). torch's flight recorder
// is such a caller.
class Hooks {
 public:
  void add(int64_t id, c10d::AbortHook hook) {
    std::lock_guard<std::mutex> guard(mutex_);
    abort_[id] = std::make_shared<c10d::AbortHook>(std::move(hook));
  }
  void add(int64_t id, c10d::CompletionHook hook) {
    std::lock_guard<std::mutex> guard(mutex_);
    completion_[id] = std::make_shared<c10d::CompletionHook>(std::move(hook));
  }
  void dropAbort(int64_t id) {
    std::lock_guard<std::mutex> guard(mutex_);
    abort_.erase(id);
  }
  void dropCompletion(int64_t id) {
    std::lock_guard<std::mutex> guard(mutex_);
    completion_.erase(id);
  }
  void completed(uint64_t key, float milliseconds) {
    for (auto& hook : copies(completion_)) (*hook)({key, milliseconds});
  }
  void failed() {
    for (auto& hook : copies(abort_)) (*hook)();
  }

 private:
  // Hooks run without our lock: they may take their own, or the GIL.
  template <typename Map>
  std::vector<typename Map::mapped_type> copies(const Map& map) {
    std::lock_guard<std::mutex> guard(mutex_);
    std::vector<typename Map::mapped_type> out;
    for (auto& [id, hook] : map) out.push_back(hook);
    return out;
  }

  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<c10d::AbortHook>> abort_;
  std::map<int64_t, std::shared_ptr<c10d::CompletionHook>> completion_;
};

// What a group's Works share with it, and outlive it with.
struct Shared {
  Counters counters;
  Extensions extensions;
  Hooks hooks;
};

} // namespace firefly
