// Who holds the core's group, and when it is destroyed.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "work.h"

namespace firefly {

namespace py = pybind11;

inline void destroyComm(ffr_comm* comm) {
  if (insideDone) { // joins the progress thread, which may be this one
    std::thread([comm] { ffr_comm_destroy(comm); }).detach();
  } else if (Py_IsInitialized() && PyGILState_Check()) {
    py::gil_scoped_release noGil;
    ffr_comm_destroy(comm);
  } else {
    ffr_comm_destroy(comm);
  }
}

// A call takes a reference for its time, so that shutdown() from another thread destroys the group
// only after it.
class Holder {
 public:
  explicit Holder(ffr_comm* comm) : comm_(comm, destroyComm) {}

  std::shared_ptr<ffr_comm> get() {
    std::lock_guard<std::mutex> guard(mutex_);
    return comm_;
  }

  void drop() {
    std::lock_guard<std::mutex> turn(dropMutex_); // a second drop() returns after the first
    std::shared_ptr<ffr_comm> last;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      last.swap(comm_);
    }
  }

 private:
  std::mutex dropMutex_, mutex_;
  std::shared_ptr<ffr_comm> comm_;
};

// All groups of the process.
class Live {
 public:
  static void add(const std::shared_ptr<Holder>& holder) {
    std::lock_guard<std::mutex> guard(mutex());
    auto& all = holders();
    all.erase(std::remove_if(all.begin(), all.end(), [](auto& weak) { return weak.expired(); }), all.end());
    all.push_back(holder);
  }

  // Before the interpreter goes: a progress thread must not ask for the GIL of a finalized one.
  static void shutdown() {
    std::vector<std::weak_ptr<Holder>> all;
    {
      std::lock_guard<std::mutex> guard(mutex());
      all.swap(holders());
    }
    for (auto& weak : all)
      if (auto holder = weak.lock()) holder->drop();
  }

 private:
  static std::mutex& mutex() {
    static std::mutex it;
    return it;
  }
  // Never destroyed: groups may end after static destructors have run.
  static std::vector<std::weak_ptr<Holder>>& holders() {
    static auto* const all = new std::vector<std::weak_ptr<Holder>>;
    return *all;
  }
};

} // namespace firefly
