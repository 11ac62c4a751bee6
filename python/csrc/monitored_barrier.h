// Every rank reports to rank 0, which names those that do not, and lets the others go on.
#pragma once

#include <functional>
#include <utility>

#include "work.h"

namespace firefly {

// `point` sends or receives an empty message.
class MonitoredBarrier {
 public:
  using Point = std::function<c10::intrusive_ptr<c10d::Work>(ffr_op_kind, int peer, uint32_t tag, milliseconds limit)>;

  // `usual`: the group's time limit.
  static void run(int rank, int size, milliseconds limit, milliseconds usual, bool waitAllRanks, const Point& point) {
    if (limit.count() <= 0)
      C10_THROW_ERROR(
          DistBackendError, c10::str("Rank ", rank, " timed out in monitoredBarrier after ", limit.count(), " ms."));
    if (rank == 0)
      collect(size, limit, usual, waitAllRanks, point);
    else
      report(rank, limit, point);
  }

 private:
  static void report(int rank, milliseconds limit, const Point& point) {
    point(FFR_SEND, 0, kMonitorTag, limit)->wait(kNoTimeout);
    try {
      // Rank 0 may use its whole limit before it answers.
      point(FFR_RECV, 0, kMonitorAckTag, limit + milliseconds(2000))->wait(kNoTimeout);
    } catch (const c10::Error& e) {
      C10_THROW_ERROR(
          DistBackendError,
          c10::str("Rank ", rank, " successfully reached monitoredBarrier, but received errors while waiting for "
                   "send/recv from rank 0. Please check rank 0 logs for faulty rank. Cause: ",
                   e.what_without_backtrace()));
    }
  }

  static void collect(int size, milliseconds limit, milliseconds usual, bool waitAllRanks, const Point& point) {
    std::vector<int> missing;
    std::string cause;
    std::vector<std::pair<int, c10::intrusive_ptr<c10d::Work>>> reports;
    for (int peer = 1; peer < size; peer++) reports.emplace_back(peer, point(FFR_RECV, peer, kMonitorTag, limit));
    for (auto& [peer, report] : reports) {
      try {
        report->wait(kNoTimeout);
      } catch (const c10::Error& e) {
        missing.push_back(peer);
        if (cause.empty()) cause = e.what_without_backtrace();
        if (!waitAllRanks) break;
      }
    }
    if (!missing.empty()) {
      std::string names;
      for (int peer : missing) names += (names.empty() ? "" : ", ") + std::to_string(peer);
      C10_THROW_ERROR(
          DistBackendError,
          c10::str(waitAllRanks || missing.size() > 1 ? "Ranks " : "Rank ", names,
                   " failed to pass monitoredBarrier in ", limit.count(), " ms. Cause: ", cause));
    }
    for (int peer = 1; peer < size; peer++) point(FFR_SEND, peer, kMonitorAckTag, usual)->wait(kNoTimeout);
  }
};

} // namespace firefly
