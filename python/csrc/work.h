// What torch waits for: one or several operations of the core.
#pragma once

#include <torch/csrc/distributed/c10d/Work.hpp>

#include <atomic>
#include <cstdio>
#include <memory>

#include "errors.h"
#include "shared.h"

namespace firefly {

// True on a thread that is inside a callback of the core, which must not join the progress thread.
inline thread_local int insideDone = 0;

// A Work that ends by one call of complete(), on whatever thread: hooks first, then who waits, then
// the Future with what hangs on it. No lock of ours is held meanwhile.
class BaseWork : public c10d::Work {
 public:
  BaseWork(int rank, c10d::OpType type, const char* title, const std::optional<Tensors>& inputs,
           std::shared_ptr<Shared> shared)
      : Work(rank, type, title, inputs), shared_(std::move(shared)), started_(steady_clock::now()) {
    static std::atomic<uint64_t> next{1};
    key_ = next++;
  }

  std::exception_ptr exception() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    return exception_;
  }

  Tensors result() override {
    return results_;
  }

  milliseconds getTimeout() const override {
    return timeout_;
  }

  uint64_t getCompletionKey() const override {
    return key_;
  }

  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    std::unique_lock<std::mutex> lock(futureMutex_);
    if (!future_) {
      future_ = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
      if (complete_) {
        auto future = future_;
        lock.unlock();
        settle(*future);
        return future;
      }
    }
    return future_;
  }

 protected:
  void complete(std::exception_ptr error) {
    error_ = error;
    if (error)
      shared_->hooks.failed();
    else
      shared_->hooks.completed(
          key_, std::chrono::duration<float, std::milli>(steady_clock::now() - started_).count());
    finish(error);
    c10::intrusive_ptr<c10::ivalue::Future> future;
    {
      std::lock_guard<std::mutex> lock(futureMutex_);
      complete_ = true;
      future = future_;
    }
    if (future) settle(*future);
  }

  // Waits for complete(), and throws what it was given. `what`, for the message of a time limit that
  // has run out; torch's "no limit" is 0.
  bool waitForCompletion(milliseconds timeout, const char* what) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto done = [this] { return completed_; };
    if (timeout == kNoTimeout)
      cv_.wait(lock, done);
    else if (!cv_.wait_for(lock, timeout, done))
      stillRunning(timeout, what);
    lock.unlock();
    std::exception_ptr error = exception();
    if (error) std::rethrow_exception(error);
    return true;
  }

  [[noreturn]] void stillRunning(milliseconds timeout, const char* what) const {
    C10_THROW_ERROR(
        DistBackendError,
        c10::str("ffreduce ", what, " on rank ", rank_, " is not complete after wait(", timeout.count(),
                 " ms); the operation goes on"));
  }

  std::shared_ptr<Shared> shared_;
  Tensors results_;
  milliseconds timeout_{0};

 private:
  void settle(c10::ivalue::Future& future) {
    if (error_)
      future.setError(error_);
    else
      future.markCompleted(c10::IValue(results_));
  }

  const steady_clock::time_point started_;
  uint64_t key_;
  std::exception_ptr error_; // written before complete_
  std::mutex futureMutex_;   // complete_, future_
  bool complete_ = false;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

// Runs `body` as the core's callback: nothing may be thrown into the core.
template <typename Body>
void insideCallback(Body body) {
  insideDone++;
  try {
    body();
  } catch (const std::exception& e) {
    // A callback that torch ran for us has thrown; there is no caller to give it to.
    fprintf(stderr, "ffreduce: a completion callback failed: %s\n", e.what());
  } catch (...) {
    fprintf(stderr, "ffreduce: a completion callback failed\n");
  }
  insideDone--;
}

// One or several operations of one kind.
class FireflyWork : public BaseWork {
 public:
  FireflyWork(int rank, c10d::OpType type, const char* title, const std::optional<Tensors>& inputs, int kind,
              size_t parts, std::shared_ptr<Shared> shared)
      : BaseWork(rank, type, title, inputs, std::move(shared)), kind_(kind), pending_(parts) {}

  ~FireflyWork() override {
    for (ffr_op* op : ops_) ffr_op_free(op);
  }

  bool isCompleted() override {
    if (Work::isCompleted()) return true;
    for (ffr_op* op : ops_)
      if (ffr_op_test(op) == FFR_PENDING) return false;
    return Work::isCompleted();
  }

  bool wait(milliseconds timeout) override {
    if (!Work::isCompleted()) {
      const auto deadline = steady_clock::now() + timeout;
      for (ffr_op* op : ops_) {
        int64_t limit = -1;
        if (timeout != kNoTimeout)
          limit = std::max<int64_t>(
              0, std::chrono::duration_cast<milliseconds>(deadline - steady_clock::now()).count());
        if (ffr_op_wait(op, limit) == FFR_PENDING) stillRunning(timeout, kKindNames[kind_]);
      }
    }
    // The core's `done` has returned for every part, so this does not wait long.
    return waitForCompletion(kNoTimeout, kKindNames[kind_]);
  }

  int sourceRank() const override {
    TORCH_CHECK(!ops_.empty(), "no operation, no source rank");
    return ffr_op_source(ops_.front());
  }

  uint64_t getSequencenumber() const override {
    return ops_.empty() ? 0 : ffr_op_sequence(ops_.back());
  }

 private:
  friend class FireflyBackend;

  // Called by the core, exactly once per part, without the GIL and without a lock of its own.
  static void done(void* context, ffr_status status, const char* message) {
    auto work = c10::intrusive_ptr<FireflyWork>::reclaim(static_cast<FireflyWork*>(context));
    insideCallback([&] { work->endParts(1, status, message); });
    insideDone++; // what is dropped here may be the last owner of a group
    work.reset();
    insideDone--;
  }

  void endParts(size_t parts, ffr_status status, const char* message) {
    if (status != FFR_OK) {
      std::lock_guard<std::mutex> lock(errorMutex_);
      if (!firstError_) firstError_ = asException(status, message);
    }
    if (pending_.fetch_sub(parts) != parts) return;
    shared_->counters.ended(kind_);
    if (!extensions_.empty()) shared_->extensions.drop(extensions_);
    keep_.clear();
    complete(firstError_);
  }

  const int kind_;
  std::atomic<size_t> pending_;
  std::vector<uint64_t> extensions_;
  std::vector<ffr_op*> ops_; // filled by the submitting thread before it hands the Work out
  Tensors keep_;
  std::mutex errorMutex_; // firstError_ until the last part
  std::exception_ptr firstError_;
};

// What startCoalescing() ... endCoalescing() gathered: complete when all of it is.
class CoalescedWork : public c10d::Work {
 public:
  CoalescedWork(int rank, std::vector<c10::intrusive_ptr<c10d::Work>> works)
      : Work(rank, c10d::OpType::COALESCED), works_(std::move(works)) {}

  bool isCompleted() override {
    for (auto& work : works_)
      if (!work->isCompleted()) return false;
    return true;
  }

  bool isSuccess() const override {
    for (auto& work : works_)
      if (!work->isSuccess()) return false;
    return true;
  }

  std::exception_ptr exception() const override {
    for (auto& work : works_)
      if (auto error = work->exception()) return error;
    return nullptr;
  }

  bool wait(milliseconds timeout) override {
    const auto deadline = steady_clock::now() + timeout;
    for (auto& work : works_) {
      if (timeout == kNoTimeout)
        work->wait(kNoTimeout);
      else
        work->wait(std::max(
            milliseconds(1), std::chrono::duration_cast<milliseconds>(deadline - steady_clock::now())));
    }
    return true;
  }

  Tensors result() override {
    Tensors all;
    for (auto& work : works_)
      for (auto& tensor : work->result()) all.push_back(tensor);
    return all;
  }

  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    auto left = std::make_shared<std::atomic<size_t>>(works_.size());
    auto self = c10::intrusive_ptr<CoalescedWork>::reclaim_copy(this);
    const auto end = [future, self] {
      if (auto error = self->exception())
        future->setError(error);
      else
        future->markCompleted(c10::IValue(self->result()));
    };
    if (works_.empty()) end();
    for (auto& work : works_)
      work->getFuture()->addCallback([left, end](c10::ivalue::Future&) {
        if (left->fetch_sub(1) == 1) end();
      });
    return future;
  }

 private:
  const std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};

} // namespace firefly
