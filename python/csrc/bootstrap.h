// How a group's ranks meet through torch's store, and who is named if one does not come.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <cerrno>
#include <cstring>
#include <iomanip>
#include <random>
#include <set>
#include <sstream>
#include <thread>

#include "errors.h"
#include "kinds.h"

namespace firefly {

// c10d's store as the core's bootstrap store. Used on the thread inside ffr_comm_create only.
struct StoreBridge {
  c10d::Store& store;
  std::string attempt; // comes before every key
  std::string error;

  static int32_t set(void* context, const char* key, const uint8_t* value, size_t length) {
    auto& self = *static_cast<StoreBridge*>(context);
    try {
      self.store.set(self.attempt + key, std::vector<uint8_t>(value, value + length));
      return 0;
    } catch (const std::exception& e) {
      self.error = firstLine(e.what());
      return EIO;
    } catch (...) {
      return EIO;
    }
  }

  static int32_t get(void* context, const char* key, uint8_t* buffer, size_t capacity, size_t* length,
                     uint64_t timeoutMs) {
    auto& self = *static_cast<StoreBridge*>(context);
    const auto deadline = steady_clock::now() + milliseconds(timeoutMs);
    try {
      self.store.wait({self.attempt + key}, milliseconds(std::max<uint64_t>(timeoutMs, 1)));
      const std::vector<uint8_t> value = self.store.get(self.attempt + key);
      *length = value.size();
      if (!value.empty()) memcpy(buffer, value.data(), std::min(capacity, value.size()));
      return 0;
    } catch (const std::exception& e) {
      // Stores have no error of their own for a timeout, and some return a little early.
      if (steady_clock::now() + milliseconds(20) >= deadline) return ETIMEDOUT;
      self.error = firstLine(e.what());
      return EIO;
    } catch (...) {
      return EIO;
    }
  }
};

// A connection of our own to the same store: the given one may be in use, and blocking on it would
// hold up others. Connecting takes no longer than the group may.
inline c10::intrusive_ptr<c10d::Store> ownConnection(c10d::Store& store, milliseconds timeout) {
  const auto usual = store.getTimeout();
  const bool shorter = usual > timeout;
  if (shorter) store.setTimeout(timeout);
  try {
    auto own = store.clone();
    if (shorter) store.setTimeout(usual);
    return own;
  } catch (const std::exception& e) {
    if (shorter) store.setTimeout(usual);
    C10_THROW_ERROR(
        DistBackendError,
        c10::str("the group could not be formed within ", timeout.count(), " ms: its store cannot be reached: ",
                 firstLine(e.what()), "; is rank 0, or whoever holds the store, alive?"));
  }
}

// One forming of a group. torchrun keeps the store and its keys across restarts, so what is found
// under a fixed key may be from a dead rank. Therefore every rank says hello with a fresh name; rank 0
// answers under that name, again whenever the hello changes, with the name of this attempt, which
// comes before all further keys, until every rank has shown that it knows the answer.
class Meeting {
 public:
  Meeting(c10::intrusive_ptr<c10d::Store> store, std::string group, int rank, int size, milliseconds timeout)
      : store_(std::move(store)), group_(std::move(group)), rank_(rank), size_(size), timeout_(timeout),
        deadline_(steady_clock::now() + timeout) {}

  // Blocks until all ranks are there or the time is up.
  ffr_comm* form() {
    std::string attempt;
    try {
      attempt = rank_ == 0 ? invite() : answer();
    } catch (const c10::DistBackendError&) {
      throw;
    } catch (const std::exception& e) { // the store's own: its server is gone, or was never there
      fail(c10::str("the store failed: ", firstLine(e.what())));
    }
    StoreBridge bridge{*store_, attempt + "/", {}};
    const ffr_store callbacks{&bridge, &StoreBridge::set, &StoreBridge::get};
    ffr_config config{};
    config.struct_size = sizeof config;
    config.rank = rank_;
    config.size = size_;
    config.timeout_ms = std::max<int64_t>(1, timeout_.count());
    config.form_timeout_ms = std::max<int64_t>(1, left().count());
    config.group_name = group_.c_str();
    config.store = &callbacks;
    ffr_comm* comm = nullptr;
    const ffr_status status = ffr_comm_create(&config, &comm);
    if (status == FFR_OK) return comm;
    std::string message = lastError();
    if (!bridge.error.empty()) message += " (the store said: " + bridge.error + ")";
    // Rank 0 publishes its own card only after all have come: do not blame it for who has not.
    const std::string absent = status == FFR_ERR_UNAVAILABLE ? notSeen(attempt) : "";
    if (!absent.empty()) fail("missing ranks: " + absent);
    std::rethrow_exception(asException(status, message));
  }

 private:
  milliseconds left() const {
    return std::max(
        milliseconds(1), std::chrono::duration_cast<milliseconds>(deadline_ - steady_clock::now()));
  }

  [[noreturn]] void fail(const std::string& what) const {
    C10_THROW_ERROR(
        DistBackendError,
        c10::str("rank ", rank_, " of ", size_, " in group \"", group_, "\": the group could not be formed within ",
                 timeout_.count(), " ms: ", what));
  }

  static std::string randomName() {
    std::random_device source;
    std::ostringstream out;
    for (int i = 0; i < 4; i++) out << std::hex << std::setw(8) << std::setfill('0') << source();
    return out.str();
  }

  static std::string helloKey(int rank) {
    return "ffr/hello/" + std::to_string(rank);
  }
  static std::string answerKey(int rank, const std::string& hello) {
    return "ffr/answer/" + std::to_string(rank) + "/" + hello;
  }
  static std::string seenKey(int rank, const std::string& attempt) {
    return "ffr/seen/" + attempt + "/" + std::to_string(rank);
  }

  std::string answer() {
    const std::string mine = randomName();
    store_->set(helloKey(rank_), mine);
    const std::string key = answerKey(rank_, mine);
    try {
      store_->wait({key}, left());
    } catch (const std::exception& e) {
      if (left() > milliseconds(20)) throw; // not a timeout: the store is gone
      fail("missing ranks: 0");
    }
    const std::string attempt = store_->get_to_str(key);
    store_->set(seenKey(rank_, attempt), std::string("1"));
    return attempt;
  }

  std::string invite() {
    const std::string attempt = randomName();
    std::vector<std::string> answered(size_);
    std::set<int> missing;
    for (int r = 1; r < size_; r++) missing.insert(r);
    // The store cannot wait for a value that changes, so this asks again, ever more seldom.
    auto pause = milliseconds(1);
    while (true) {
      for (auto it = missing.begin(); it != missing.end();) {
        const int r = *it;
        if (store_->check({seenKey(r, attempt)})) {
          it = missing.erase(it);
          continue;
        }
        if (store_->check({helloKey(r)})) {
          const std::string hello = store_->get_to_str(helloKey(r));
          if (hello != answered[r]) {
            store_->set(answerKey(r, hello), attempt);
            answered[r] = hello;
          }
        }
        ++it;
      }
      if (missing.empty()) return attempt;
      if (steady_clock::now() >= deadline_) {
        std::string names;
        for (int r : missing) names += (names.empty() ? "" : ", ") + std::to_string(r);
        fail("missing ranks: " + names);
      }
      std::this_thread::sleep_for(pause);
      pause = std::min(pause * 2, milliseconds(20));
    }
  }

  // Ranks that have not shown that they know the attempt.
  std::string notSeen(const std::string& attempt) {
    std::string names;
    try {
      for (int r = 1; r < size_; r++)
        if (!store_->check({seenKey(r, attempt)})) names += (names.empty() ? "" : ", ") + std::to_string(r);
    } catch (const std::exception&) {
      return ""; // the store is gone: the first error says more
    }
    return names;
  }

  c10::intrusive_ptr<c10d::Store> store_;
  const std::string group_;
  const int rank_, size_;
  const milliseconds timeout_;
  const steady_clock::time_point deadline_;
};

} // namespace firefly
