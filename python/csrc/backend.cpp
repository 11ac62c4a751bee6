// The torch side of ffreduce: a c10d::Backend over the C ABI of the Rust core (ffreduce.h).
//
// All the thinking is done in the core: matching, progress, time limits, death of peers. This file
// only translates: tensors to buffers, ops to handles, statuses to exceptions. Three rules shape it:
//
//   1. The memory of an operation stays alive until the core calls `done`, whatever the caller drops.
//      The core holds one reference to the Work per submitted operation for that reason.
//   2. `done` runs on threads that do not hold the GIL and must not wait for one that needs it: no
//      lock of ours is held while a Future is completed, and the GIL is released around every call
//      that joins the progress thread.
//   3. The core is destroyed exactly once, by whoever lets go of it last, and never from within
//      `done`.
#include <Python.h>

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <pybind11/chrono.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <iomanip>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ffreduce.h"

namespace py = pybind11;
using at::Tensor;
using c10d::OpType;
using std::chrono::milliseconds;
using std::chrono::steady_clock;
using Tensors = std::vector<Tensor>;

namespace {

// c10d numbers its reduce ops as the core does, so they pass through as they are.
static_assert(int(c10d::ReduceOp::SUM) == FFR_SUM && int(c10d::ReduceOp::AVG) == FFR_AVG);
static_assert(int(c10d::ReduceOp::PRODUCT) == FFR_PRODUCT && int(c10d::ReduceOp::MIN) == FFR_MIN);
static_assert(int(c10d::ReduceOp::MAX) == FFR_MAX && int(c10d::ReduceOp::BAND) == FFR_BAND);
static_assert(int(c10d::ReduceOp::BOR) == FFR_BOR && int(c10d::ReduceOp::BXOR) == FFR_BXOR);
static_assert(int(c10d::ReduceOp::PREMUL_SUM) == FFR_PREMUL_SUM);

// Tags at or above this one are ours: torch's tags are non-negative ints.
constexpr uint32_t kMonitorTag = 0x80000000u;
constexpr uint32_t kMonitorAckTag = 0x80000001u;

constexpr int kKinds = FFR_BARRIER + 1;
// c10d's own spelling, which profiles and tests look for.
const char* const kKindNames[kKinds] = {
    "all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all",
    "gather", "scatter", "send", "recv", "recvAnySource", "barrier"};
const char* const kStatNames[kKinds] = {
    "allreduce", "reduce", "broadcast", "allgather", "reduce_scatter", "alltoall",
    "gather", "scatter", "send", "recv", "recv_any", "barrier"};

// ---- errors -------------------------------------------------------------------------------------

std::string lastError() {
  std::string text(ffr_last_error(nullptr, 0) + 1, '\0');
  text.resize(ffr_last_error(text.data(), text.size()));
  return text;
}

std::exception_ptr asException(ffr_status status, const std::string& message) {
  const c10::SourceLocation here{__func__, __FILE__, static_cast<uint32_t>(__LINE__)};
  switch (status) {
    case FFR_ERR_INVALID:
      return std::make_exception_ptr(c10::ValueError(here, message));
    case FFR_ERR_UNSUPPORTED:
      return std::make_exception_ptr(c10::NotImplementedError(here, message));
    case FFR_ERR_TIMEOUT:
      return std::make_exception_ptr(c10::DistBackendError(
          here, message + "; if they are only slow, raise the timeout of init_process_group or new_group"));
    default:
      return std::make_exception_ptr(c10::DistBackendError(here, message));
  }
}

// ---- tensors to buffers ---------------------------------------------------------------------------

// How the core sees a tensor's elements.
struct Element {
  int32_t dtype;
  uint64_t units; // core elements per torch element
};

// `moved`: the operation only moves bytes, so a type that the core does not know travels as bytes.
Element element(const Tensor& tensor, bool moved, const char* op) {
  using S = at::ScalarType;
  switch (tensor.scalar_type()) {
    case S::Byte: return {FFR_U8, 1};
    case S::Char: return {FFR_I8, 1};
    case S::Short: return {FFR_I16, 1};
    case S::Int: return {FFR_I32, 1};
    case S::Long: return {FFR_I64, 1};
    case S::UInt16: return {FFR_U16, 1};
    case S::UInt32: return {FFR_U32, 1};
    case S::UInt64: return {FFR_U64, 1};
    case S::Bool: return {FFR_BOOL, 1};
    case S::Half: return {FFR_F16, 1};
    case S::BFloat16: return {FFR_BF16, 1};
    case S::Float: return {FFR_F32, 1};
    case S::Double: return {FFR_F64, 1};
    case S::ComplexFloat: return {FFR_COMPLEX64, 1};
    case S::ComplexDouble: return {FFR_COMPLEX128, 1};
    case S::Float8_e4m3fn: return {FFR_F8E4M3FN, 1};
    case S::Float8_e5m2: return {FFR_F8E5M2, 1};
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(
          moved, "ffreduce ", op, ": elements of type ", tensor.scalar_type(), " cannot be reduced");
      return {FFR_U8, uint64_t(tensor.element_size())};
  }
}

void checkPlace(const Tensor& tensor, const char* op) {
  TORCH_CHECK_VALUE(tensor.defined(), "ffreduce ", op, ": got an undefined tensor");
  TORCH_CHECK_NOT_IMPLEMENTED(
      tensor.layout() == at::kStrided, "ffreduce ", op, ": only dense tensors are supported, got layout ",
      tensor.layout(), "; call .to_dense() first");
  TORCH_CHECK_VALUE(
      tensor.device().is_cpu(), "ffreduce ", op, ": only CPU tensors are supported, got one on ",
      tensor.device(), "; move it with .cpu()");
}

// A tensor that the operation writes: it must be used in place.
const Tensor& writable(const Tensor& tensor, const char* op, bool elementwise) {
  checkPlace(tensor, op);
  const auto format = elementwise ? tensor.suggest_memory_format() : at::MemoryFormat::Contiguous;
  TORCH_CHECK_VALUE(
      tensor.is_contiguous(format) && !tensor.is_conj() && !tensor.is_neg(), "ffreduce ", op,
      ": the tensor that receives the result must be contiguous, got sizes ", tensor.sizes(),
      " strides ", tensor.strides(), "; pass .contiguous() and copy the result back");
  return tensor;
}

// A tensor that the operation only reads: what is not contiguous is copied.
Tensor readable(const Tensor& tensor, const char* op) {
  checkPlace(tensor, op);
  return tensor.resolve_conj().resolve_neg().contiguous();
}

// One operation before it is submitted.
struct Call {
  ffr_args args{};
  std::vector<ffr_buf> in, out;
  Tensors keep;    // read by the operation
  Tensors results; // written by it, in the order in which torch wants them back
  const char* name;
  bool moved;
  uint64_t bytesIn = 0, bytesOut = 0;
  at::ScalarType type = at::ScalarType::Undefined;

  Call(ffr_op_kind kind, const char* name) : name(name) {
    args.struct_size = sizeof args;
    args.kind = kind;
    moved = !(kind == FFR_ALLREDUCE || kind == FFR_REDUCE || kind == FFR_REDUCE_SCATTER);
  }

  ffr_buf buffer(const Tensor& tensor, uint64_t elements, uint64_t offset) {
    if (type == at::ScalarType::Undefined) {
      type = tensor.scalar_type();
      args.dtype = element(tensor, moved, name).dtype;
    }
    TORCH_CHECK_VALUE(
        type == tensor.scalar_type(), "ffreduce ", name, ": tensors of different types: ", type,
        " and ", tensor.scalar_type());
    const uint64_t size = tensor.element_size();
    char* base = elements ? static_cast<char*>(tensor.data_ptr()) + offset * size : nullptr;
    return {base, elements * element(tensor, moved, name).units};
  }

  void addIn(const Tensor& tensor, uint64_t elements, uint64_t offset = 0) {
    in.push_back(buffer(tensor, elements, offset));
    bytesIn += elements * tensor.element_size();
  }
  void addOut(const Tensor& tensor, uint64_t elements, uint64_t offset = 0) {
    out.push_back(buffer(tensor, elements, offset));
    bytesOut += elements * tensor.element_size();
  }
  // A tensor that is read.
  void reads(const Tensor& tensor) {
    keep.push_back(readable(tensor, name));
    addIn(keep.back(), keep.back().numel());
  }
  // A tensor that is written.
  void writes(const Tensor& tensor, bool elementwise = false) {
    results.push_back(writable(tensor, name, elementwise));
    addOut(tensor, tensor.numel());
  }
  // A tensor that is read and written in place.
  void updates(const Tensor& tensor) {
    writes(tensor, true);
    addIn(tensor, tensor.numel());
  }
};

// ---- counters --------------------------------------------------------------------------------------

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

struct Shared {
  Counters counters;
  Extensions extensions;
};

// ---- work ------------------------------------------------------------------------------------------

// True on a thread that is inside `done`: rule 3 of the file's head.
thread_local int insideDone = 0;

// One or several operations of the core that torch sees as one.
class FireflyWork : public c10d::Work {
 public:
  FireflyWork(int rank, OpType type, const char* title, const std::optional<Tensors>& inputs,
              int kind, size_t parts, std::shared_ptr<Shared> shared)
      : Work(rank, type, title, inputs), kind_(kind), pending_(parts), shared_(std::move(shared)) {}

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
        if (ffr_op_wait(op, limit) == FFR_PENDING) {
          C10_THROW_ERROR(
              DistBackendError,
              c10::str("ffreduce ", kKindNames[kind_], " on rank ", rank_, " is not complete after wait(",
                       timeout.count(), " ms); the operation goes on"));
        }
      }
      // The core's `done` has returned for every part, so the state is final.
      std::unique_lock<std::mutex> lock(mutex_);
      cv_.wait(lock, [this] { return completed_; });
    }
    std::exception_ptr error = exception();
    if (error) std::rethrow_exception(error);
    return true;
  }

  std::exception_ptr exception() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    return exception_;
  }

  Tensors result() override {
    return results_;
  }

  int sourceRank() const override {
    TORCH_CHECK(!ops_.empty(), "no operation, no source rank");
    return ffr_op_source(ops_.front());
  }

  uint64_t getSequencenumber() const override {
    return ops_.empty() ? 0 : ffr_op_sequence(ops_.back());
  }

  milliseconds getTimeout() const override {
    return timeout_;
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

 private:
  friend class FireflyBackend;

  // Called by the core, exactly once per part, without the GIL and without a lock of its own.
  static void done(void* context, ffr_status status, const char* message) {
    auto work = c10::intrusive_ptr<FireflyWork>::reclaim(static_cast<FireflyWork*>(context));
    insideDone++;
    try {
      work->endParts(1, status, message);
    } catch (const std::exception& e) {
      // A callback that torch ran for us has thrown; there is no caller to give it to.
      fprintf(stderr, "ffreduce: a completion callback failed: %s\n", e.what());
    } catch (...) {
      fprintf(stderr, "ffreduce: a completion callback failed\n");
    }
    work.reset();
    insideDone--;
  }

  void endParts(size_t parts, ffr_status status, const char* message) {
    if (status != FFR_OK) {
      std::lock_guard<std::mutex> lock(futureMutex_);
      if (!error_) error_ = asException(status, message);
    }
    if (pending_.fetch_sub(parts) != parts) return;
    shared_->counters.ended(kind_);
    if (!extensions_.empty()) shared_->extensions.drop(extensions_);
    keep_.clear();
    finish(error_);
    c10::intrusive_ptr<c10::ivalue::Future> future;
    {
      std::lock_guard<std::mutex> lock(futureMutex_);
      complete_ = true;
      future = future_;
    }
    if (future) settle(*future);
  }

  void settle(c10::ivalue::Future& future) {
    if (error_)
      future.setError(error_);
    else
      future.markCompleted(c10::IValue(results_));
  }

  const int kind_;
  std::atomic<size_t> pending_;
  std::shared_ptr<Shared> shared_;
  std::vector<uint64_t> extensions_;
  std::vector<ffr_op*> ops_; // filled by the submitting thread before it hands the Work out
  Tensors keep_, results_;
  milliseconds timeout_{0};

  std::mutex futureMutex_; // error_ until the last part, complete_, future_
  std::exception_ptr error_;
  bool complete_ = false;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

// ---- the group ---------------------------------------------------------------------------------------

void destroyComm(ffr_comm* comm) {
  if (insideDone) { // joins the progress thread, which may be this one
    std::thread([comm] { ffr_comm_destroy(comm); }).detach();
  } else if (Py_IsInitialized() && PyGILState_Check()) {
    py::gil_scoped_release noGil;
    ffr_comm_destroy(comm);
  } else {
    ffr_comm_destroy(comm);
  }
}

// c10d's store as the core's bootstrap store. Used on the thread inside ffr_comm_create only.
struct StoreBridge {
  c10::intrusive_ptr<c10d::Store> store;
  std::string attempt; // comes before every key
  std::string error;

  static int32_t set(void* context, const char* key, const uint8_t* value, size_t length) {
    auto& self = *static_cast<StoreBridge*>(context);
    try {
      self.store->set(self.attempt + key, std::vector<uint8_t>(value, value + length));
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
      self.store->wait({self.attempt + key}, milliseconds(std::max<uint64_t>(timeoutMs, 1)));
      const std::vector<uint8_t> value = self.store->get(self.attempt + key);
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

  static std::string firstLine(const char* text) {
    const std::string all = text;
    return all.substr(0, all.find('\n'));
  }
};

std::string randomName() {
  std::random_device source;
  std::ostringstream out;
  for (int i = 0; i < 4; i++) out << std::hex << std::setw(8) << std::setfill('0') << source();
  return out.str();
}

// A name for this forming of the group that no key of an earlier one can carry. torchrun keeps the
// store and its keys across restarts, so what is found under a fixed key may be from a dead rank.
// Every rank says hello with a fresh name; rank 0 answers under that name, again whenever the hello
// changes, until every rank has shown that it knows the answer.
std::string agreeOnAttempt(c10d::Store& store, const std::string& group, int rank, int size, milliseconds timeout) {
  const auto deadline = steady_clock::now() + timeout;
  const std::string mine = randomName();
  if (size == 1) return mine + "/";
  auto fail = [&](const std::string& what) {
    C10_THROW_ERROR(
        DistBackendError,
        c10::str("rank ", rank, " of ", size, " in group \"", group, "\": the group could not be formed within ",
                 timeout.count(), " ms: ", what));
  };
  auto helloKey = [](int r) { return "ffr/hello/" + std::to_string(r); };
  auto answerKey = [](int r, const std::string& hello) { return "ffr/answer/" + std::to_string(r) + "/" + hello; };
  auto seenKey = [](int r, const std::string& attempt) { return "ffr/seen/" + attempt + "/" + std::to_string(r); };
  if (rank != 0) {
    store.set(helloKey(rank), mine);
    const std::string key = answerKey(rank, mine);
    try {
      store.wait({key}, timeout);
    } catch (const std::exception& e) {
      fail(std::string("no answer from rank 0 (the store said: ") + StoreBridge::firstLine(e.what()) + ")");
    }
    const std::string attempt = store.get_to_str(key);
    store.set(seenKey(rank, attempt), std::string("1"));
    return attempt + "/";
  }
  std::vector<std::string> answered(size);
  std::set<int> missing;
  for (int r = 1; r < size; r++) missing.insert(r);
  auto pause = milliseconds(1);
  while (true) {
    for (auto it = missing.begin(); it != missing.end();) {
      const int r = *it;
      if (store.check({seenKey(r, mine)})) {
        it = missing.erase(it);
        continue;
      }
      if (store.check({helloKey(r)})) {
        const std::string hello = store.get_to_str(helloKey(r));
        if (hello != answered[r]) {
          store.set(answerKey(r, hello), mine);
          answered[r] = hello;
        }
      }
      ++it;
    }
    if (missing.empty()) return mine + "/";
    if (steady_clock::now() >= deadline) {
      std::string names;
      for (int r : missing) names += (names.empty() ? "" : ", ") + std::to_string(r);
      fail("missing ranks: " + names);
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, milliseconds(20));
  }
}

const char* interned(const std::string& text) { // profiler titles must outlive their events
  static std::mutex mutex;
  static auto* const texts = new std::set<std::string>;
  std::lock_guard<std::mutex> guard(mutex);
  return texts->insert(text).first->c_str();
}

// Who holds the core's group. A call takes a reference for its time, so that shutdown() from another
// thread destroys the group only after it.
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

std::mutex liveMutex;
std::vector<std::weak_ptr<Holder>>& live() {
  static auto* const all = new std::vector<std::weak_ptr<Holder>>;
  return *all;
}

// Before the interpreter goes: a progress thread must not ask for the GIL of a finalized one.
void shutdownAll() {
  std::vector<std::weak_ptr<Holder>> all;
  {
    std::lock_guard<std::mutex> guard(liveMutex);
    all.swap(live());
  }
  for (auto& weak : all)
    if (auto holder = weak.lock()) holder->drop();
}

class FireflyBackend : public c10d::Backend {
 public:
  FireflyBackend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, milliseconds timeout,
                 std::string name, const std::string& group)
      : Backend(rank, size), name_(std::move(name)), timeoutMs_(timeout.count()),
        shared_(std::make_shared<Shared>()) {
    StoreBridge bridge{size > 1 ? store->clone() : store, {}, {}};
    bridge.attempt = agreeOnAttempt(*bridge.store, group, rank, size, timeout);
    const ffr_store callbacks{&bridge, &StoreBridge::set, &StoreBridge::get};
    ffr_config config{};
    config.struct_size = sizeof config;
    config.rank = rank;
    config.size = size;
    config.timeout_ms = std::max<int64_t>(1, timeout.count());
    config.group_name = group.c_str();
    config.store = &callbacks;
    ffr_comm* comm = nullptr;
    const ffr_status status = ffr_comm_create(&config, &comm);
    if (status != FFR_OK) {
      std::string message = lastError();
      if (!bridge.error.empty()) message += " (the store said: " + bridge.error + ")";
      std::rethrow_exception(asException(status, message));
    }
    holder_ = std::make_shared<Holder>(comm);
    for (int kind = 0; kind < kKinds; kind++) titles_[kind] = interned(name_ + ":" + kKindNames[kind]);
    init();
    std::lock_guard<std::mutex> guard(liveMutex);
    auto& all = live();
    all.erase(std::remove_if(all.begin(), all.end(), [](auto& weak) { return weak.expired(); }), all.end());
    all.push_back(holder_);
  }

  const std::string getBackendName() const override {
    return name_;
  }

  c10::intrusive_ptr<Options> getBackendOptions() override {
    auto options = c10::make_intrusive<Options>(name_, milliseconds(timeoutMs_.load()));
    options->group_name = getGroupUid();
    options->group_desc = getGroupDesc();
    return options;
  }

  void setTimeout(milliseconds timeout) override {
    TORCH_CHECK_VALUE(timeout.count() > 0, "ffreduce: the timeout must be positive, got ", timeout.count(), " ms");
    timeoutMs_ = timeout.count();
    if (auto comm = held()) ffr_comm_set_timeout(comm.get(), timeout.count());
  }

  void addEphemeralTimeout(const milliseconds& timeout) override {
    shared_->extensions.add(timeout);
  }

  uint64_t getSequenceNumberForGroup() override {
    return ffr_comm_sequence(comm().get());
  }

  c10d::ErrorType getError() override {
    auto comm = held();
    if (!comm) return c10d::ErrorType::SUCCESS;
    switch (ffr_comm_error(comm.get(), nullptr, 0)) {
      case FFR_OK: return c10d::ErrorType::SUCCESS;
      case FFR_ERR_TIMEOUT: return c10d::ErrorType::TIMEOUT;
      case FFR_ERR_PEER_DIED: return c10d::ErrorType::REMOTE_ERROR;
      default: return c10d::ErrorType::COMM_ERROR;
    }
  }

  void abort() override {
    if (auto comm = held()) ffr_comm_abort(comm.get(), "abort() of the process group was called");
  }

  void shutdown() override {
    holder_->drop();
  }

  // -- collectives

  c10::intrusive_ptr<c10d::Work> broadcast(Tensors& tensors, const c10d::BroadcastOptions& opts) override {
    Call call(FFR_BROADCAST, "broadcast");
    call.args.root = checkRank(opts.rootRank, "broadcast", "root");
    const Tensor& tensor = single(tensors, "broadcast");
    if (rank_ == opts.rootRank) {
      call.writes(tensor, true);
      call.addIn(tensor, tensor.numel());
    } else {
      call.writes(tensor, true);
    }
    return start(OpType::BROADCAST, std::move(call), opts, tensors);
  }

  c10::intrusive_ptr<c10d::Work> allreduce(Tensors& tensors, const c10d::AllreduceOptions& opts) override {
    Call call(FFR_ALLREDUCE, "allreduce");
    call.updates(single(tensors, "allreduce"));
    setOp(call, opts.reduceOp);
    return start(OpType::ALLREDUCE, std::move(call), opts, tensors);
  }

  c10::intrusive_ptr<c10d::Work> allreduce_coalesced(
      Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) override {
    std::vector<Call> calls;
    for (const Tensor& tensor : tensors) {
      calls.emplace_back(FFR_ALLREDUCE, "allreduce_coalesced");
      calls.back().updates(tensor);
      setOp(calls.back(), opts.reduceOp);
    }
    return startAll(OpType::ALLREDUCE_COALESCED, std::move(calls), opts, tensors);
  }

  c10::intrusive_ptr<c10d::Work> reduce(Tensors& tensors, const c10d::ReduceOptions& opts) override {
    Call call(FFR_REDUCE, "reduce");
    call.args.root = checkRank(opts.rootRank, "reduce", "root");
    const Tensor& tensor = single(tensors, "reduce");
    if (rank_ == opts.rootRank) {
      call.updates(tensor);
    } else {
      call.results.push_back(writable(tensor, "reduce", true));
      call.addIn(tensor, tensor.numel());
    }
    setOp(call, opts.reduceOp);
    return start(OpType::REDUCE, std::move(call), opts, tensors);
  }

  c10::intrusive_ptr<c10d::Work> allgather(
      std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) override {
    Call call(FFR_ALLGATHER, "allgather");
    call.reads(single(inputs, "allgather"));
    for (const Tensor& tensor : perRank(single(outputs, "allgather"), "allgather", "outputs")) call.writes(tensor);
    return start(OpType::ALLGATHER, std::move(call), opts, inputs);
  }

  c10::intrusive_ptr<c10d::Work> all_gather_single(
      Tensor& output, Tensor& input, const c10d::AllgatherOptions& opts) override {
    return start(OpType::_ALLGATHER_BASE, gatherSingleCall(output, input), opts, {input});
  }

  c10::intrusive_ptr<c10d::Work> allgather_coalesced(
      std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) override {
    TORCH_CHECK_VALUE(
        outputs.size() == size_t(size_), "ffreduce allgather_coalesced: needs one list of outputs per rank (", size_,
        "), got ", outputs.size());
    std::vector<Call> calls;
    for (size_t i = 0; i < inputs.size(); i++) {
      calls.emplace_back(FFR_ALLGATHER, "allgather_coalesced");
      calls.back().reads(inputs[i]);
      for (const Tensors& ofRank : outputs) {
        TORCH_CHECK_VALUE(
            ofRank.size() == inputs.size(), "ffreduce allgather_coalesced: every rank's list of outputs needs ",
            inputs.size(), " tensors, one has ", ofRank.size());
        calls.back().writes(ofRank[i]);
      }
    }
    return startAll(OpType::ALLGATHER_COALESCED, std::move(calls), opts, inputs);
  }

  c10::intrusive_ptr<c10d::Work> all_gather_single_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) override {
    samePairs(outputs, inputs, "all_gather_single_coalesced");
    std::vector<Call> calls;
    for (size_t i = 0; i < inputs.size(); i++) calls.push_back(gatherSingleCall(outputs[i], inputs[i]));
    return startAll(OpType::ALLGATHER_INTO_TENSOR_COALESCED, std::move(calls), opts, inputs);
  }

  c10::intrusive_ptr<c10d::Work> gather(
      std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& opts) override {
    Call call(FFR_GATHER, "gather");
    call.args.root = checkRank(opts.rootRank, "gather", "root");
    call.reads(single(inputs, "gather"));
    if (rank_ == opts.rootRank)
      for (const Tensor& tensor : perRank(single(outputs, "gather"), "gather", "outputs")) call.writes(tensor);
    return start(OpType::GATHER, std::move(call), opts, inputs);
  }

  c10::intrusive_ptr<c10d::Work> gather_single(
      Tensor& output, Tensor& input, const c10d::GatherOptions& opts) override {
    Call call(FFR_GATHER, "gather_single");
    call.args.root = checkRank(opts.rootRank, "gather_single", "root");
    call.reads(input);
    if (rank_ == opts.rootRank) {
      TORCH_CHECK_VALUE(
          output.numel() == input.numel() * size_, "ffreduce gather_single: the output must hold ", size_, " x ",
          input.numel(), " elements, it holds ", output.numel());
      call.writes(output);
    }
    return start(OpType::GATHER, std::move(call), opts, {input});
  }

  c10::intrusive_ptr<c10d::Work> scatter(
      Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& opts) override {
    Call call(FFR_SCATTER, "scatter");
    call.args.root = checkRank(opts.rootRank, "scatter", "root");
    if (rank_ == opts.rootRank)
      for (const Tensor& tensor : perRank(single(inputs, "scatter"), "scatter", "inputs")) call.reads(tensor);
    call.writes(single(outputs, "scatter"));
    return start(OpType::SCATTER, std::move(call), opts, outputs);
  }

  c10::intrusive_ptr<c10d::Work> reduce_scatter(
      Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ReduceScatterOptions& opts) override {
    Call call(FFR_REDUCE_SCATTER, "reduce_scatter");
    for (const Tensor& tensor : perRank(single(inputs, "reduce_scatter"), "reduce_scatter", "inputs"))
      call.reads(tensor);
    call.writes(single(outputs, "reduce_scatter"));
    setOp(call, opts.reduceOp);
    return start(OpType::REDUCE_SCATTER, std::move(call), opts, outputs);
  }

  c10::intrusive_ptr<c10d::Work> reduce_scatter_single(
      Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& opts) override {
    return start(OpType::_REDUCE_SCATTER_BASE, reduceScatterSingleCall(output, input, opts.reduceOp), opts, {input});
  }

  c10::intrusive_ptr<c10d::Work> reduce_scatter_single_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& opts) override {
    samePairs(outputs, inputs, "reduce_scatter_single_coalesced");
    std::vector<Call> calls;
    for (size_t i = 0; i < inputs.size(); i++)
      calls.push_back(reduceScatterSingleCall(outputs[i], inputs[i], opts.reduceOp));
    return startAll(OpType::REDUCE_SCATTER_TENSOR_COALESCED, std::move(calls), opts, inputs);
  }

  c10::intrusive_ptr<c10d::Work> all_to_all_single(
      Tensor& output, Tensor& input, std::vector<int64_t>& outputSplits, std::vector<int64_t>& inputSplits,
      const c10d::AllToAllOptions& opts) override {
    Call call(FFR_ALLTOALL, "all_to_all_single");
    call.keep.push_back(readable(input, call.name));
    call.results.push_back(writable(output, call.name, false));
    const Tensor& in = call.keep.back();
    splits(in, inputSplits, "input", [&](uint64_t n, uint64_t at) { call.addIn(in, n, at); });
    splits(output, outputSplits, "output", [&](uint64_t n, uint64_t at) { call.addOut(output, n, at); });
    return start(OpType::ALLTOALL_BASE, std::move(call), opts, {input});
  }

  c10::intrusive_ptr<c10d::Work> alltoall(
      Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& opts) override {
    Call call(FFR_ALLTOALL, "alltoall");
    for (const Tensor& tensor : perRank(inputs, "alltoall", "inputs")) call.reads(tensor);
    for (const Tensor& tensor : perRank(outputs, "alltoall", "outputs")) call.writes(tensor);
    return start(OpType::ALLTOALL, std::move(call), opts, inputs);
  }

  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& opts) override {
    return start(OpType::BARRIER, Call(FFR_BARRIER, "barrier"), opts, {});
  }

  // Every rank reports to rank 0, which names those that do not.
  void monitoredBarrier(const c10d::BarrierOptions& opts, bool waitAllRanks) override {
    const milliseconds limit = opts.timeout == c10d::kUnsetTimeout ? milliseconds(timeoutMs_.load()) : opts.timeout;
    const auto deadline = steady_clock::now() + limit;
    auto left = [&] {
      return std::max(
          milliseconds(1), std::chrono::duration_cast<milliseconds>(deadline - steady_clock::now()));
    };
    if (rank_ != 0) {
      point(FFR_SEND, 0, kMonitorTag, limit)->wait(kNoTimeout);
      try {
        // Rank 0 may use its whole limit before it answers.
        point(FFR_RECV, 0, kMonitorAckTag, limit + milliseconds(2000))->wait(kNoTimeout);
      } catch (const c10::Error& e) {
        C10_THROW_ERROR(
            DistBackendError,
            c10::str("Rank ", rank_, " successfully reached monitoredBarrier, but received errors while waiting for "
                     "send/recv from rank 0. Please check rank 0 logs for faulty rank. Cause: ",
                     e.what_without_backtrace()));
      }
      return;
    }
    if (limit.count() <= 0)
      C10_THROW_ERROR(DistBackendError, c10::str("Rank 0 timed out in monitoredBarrier after ", limit.count(), " ms."));
    std::vector<int> missing;
    std::string cause;
    std::vector<std::pair<int, c10::intrusive_ptr<c10d::Work>>> reports;
    for (int peer = 1; peer < size_; peer++) reports.emplace_back(peer, point(FFR_RECV, peer, kMonitorTag, left()));
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
    for (int peer = 1; peer < size_; peer++)
      point(FFR_SEND, peer, kMonitorAckTag, milliseconds(timeoutMs_.load()))->wait(kNoTimeout);
  }

  // -- point to point

  c10::intrusive_ptr<c10d::Work> send(Tensors& tensors, int destination, int tag) override {
    Call call(FFR_SEND, "send");
    call.args.peer = checkRank(destination, "send", "destination");
    call.args.tag = checkTag(tag, "send");
    call.reads(single(tensors, "send"));
    return start(OpType::SEND, std::move(call), Plain{}, tensors);
  }

  c10::intrusive_ptr<c10d::Work> recv(Tensors& tensors, int source, int tag) override {
    Call call(FFR_RECV, "recv");
    call.args.peer = checkRank(source, "recv", "source");
    call.args.tag = checkTag(tag, "recv");
    call.writes(single(tensors, "recv"));
    return start(OpType::RECV, std::move(call), Plain{}, tensors);
  }

  c10::intrusive_ptr<c10d::Work> recvAnysource(Tensors& tensors, int tag) override {
    Call call(FFR_RECV_ANY, "recv");
    call.args.tag = checkTag(tag, "recv");
    call.writes(single(tensors, "recv"));
    return start(OpType::RECVANYSOURCE, std::move(call), Plain{}, tensors);
  }

  py::dict stats() {
    ffr_stats s{};
    s.struct_size = sizeof s;
    auto comm = this->comm();
    const ffr_status status = ffr_comm_stats(comm.get(), &s);
    if (status != FFR_OK) std::rethrow_exception(asException(status, lastError()));
    py::dict out;
    std::string transport = s.local_peers ? "shm" : "";
    if (s.rdma_peers) transport += transport.empty() ? "rdma" : "+rdma";
    if (s.remote_peers > s.rdma_peers) transport += transport.empty() ? "tcp" : "+tcp";
    out["transport"] = transport.empty() ? "none" : transport;
    out["local_peers"] = s.local_peers;
    out["remote_peers"] = s.remote_peers;
    out["ops_submitted"] = s.ops_submitted;
    out["ops_completed"] = s.ops_completed;
    out["ops_failed"] = s.ops_failed;
    out["shm_bytes_sent"] = s.shm_bytes_sent;
    out["shm_bytes_received"] = s.shm_bytes_received;
    out["tcp_bytes_sent"] = s.tcp_bytes_sent;
    out["tcp_bytes_received"] = s.tcp_bytes_received;
    out["rdma_bytes_sent"] = s.rdma_bytes_sent;
    out["rdma_bytes_received"] = s.rdma_bytes_received;
    out["copied_bytes"] = s.copied_bytes;
    out["reduced_bytes"] = s.reduced_bytes;
    py::dict operations;
    for (int kind = 0; kind < kKinds; kind++) {
      const Counter c = shared_->counters.read(kind);
      if (!c.calls) continue;
      py::dict one;
      one["calls"] = c.calls;
      one["bytes"] = c.bytes;
      one["seconds"] = c.seconds;
      operations[kStatNames[kind]] = one;
    }
    out["operations"] = operations;
    return out;
  }

 private:
  // Options of calls that torch gives none.
  struct Plain {
    milliseconds timeout = c10d::kUnsetTimeout;
    bool asyncOp = true;
  };

  // The group, or nothing after shutdown().
  std::shared_ptr<ffr_comm> held() {
    return holder_->get();
  }

  std::shared_ptr<ffr_comm> comm() {
    auto comm = held();
    if (!comm)
      C10_THROW_ERROR(
          DistBackendError, c10::str("ffreduce: the process group of rank ", rank_, " was shut down; make a new one"));
    return comm;
  }

  template <typename T>
  static T& single(std::vector<T>& list, const char* op) {
    TORCH_CHECK_VALUE(list.size() == 1, "ffreduce ", op, ": needs exactly one tensor or list, got ", list.size());
    return list.front();
  }

  const Tensors& perRank(const Tensors& list, const char* op, const char* what) const {
    TORCH_CHECK_VALUE(
        list.size() == size_t(size_), "ffreduce ", op, ": needs one tensor per rank (", size_, ") as ", what, ", got ",
        list.size());
    return list;
  }

  static void samePairs(const Tensors& outputs, const Tensors& inputs, const char* op) {
    TORCH_CHECK_VALUE(
        outputs.size() == inputs.size(), "ffreduce ", op, ": ", outputs.size(), " outputs for ", inputs.size(),
        " inputs");
  }

  int checkRank(int64_t rank, const char* op, const char* what) const {
    TORCH_CHECK_VALUE(
        rank >= 0 && rank < size_, "ffreduce ", op, ": the ", what, " is rank ", rank, ", but the group has ranks 0 to ",
        size_ - 1);
    return int(rank);
  }

  static uint32_t checkTag(int tag, const char* op) {
    TORCH_CHECK_VALUE(tag >= 0, "ffreduce ", op, ": the tag must not be negative, got ", tag);
    return uint32_t(tag);
  }

  static void setOp(Call& call, const c10d::ReduceOp& op) {
    call.args.redop = int32_t(op.op_);
    if (op.op_ != c10d::ReduceOp::PREMUL_SUM) return;
    const auto* supplement = dynamic_cast<c10d::PreMulSumSupplement*>(op.supplement_.get());
    TORCH_CHECK_VALUE(supplement, "ffreduce ", call.name, ": PREMUL_SUM without a factor");
    call.args.factor = supplement->tensor_factor.defined() ? supplement->tensor_factor.item<double>()
                                                           : supplement->double_factor;
  }

  Call gatherSingleCall(const Tensor& output, const Tensor& input) {
    Call call(FFR_ALLGATHER, "all_gather_single");
    TORCH_CHECK_VALUE(
        output.numel() == input.numel() * size_, "ffreduce all_gather_single: the output must hold ", size_, " x ",
        input.numel(), " elements, it holds ", output.numel());
    call.reads(input);
    call.writes(output);
    return call;
  }

  Call reduceScatterSingleCall(const Tensor& output, const Tensor& input, const c10d::ReduceOp& op) {
    Call call(FFR_REDUCE_SCATTER, "reduce_scatter_single");
    TORCH_CHECK_VALUE(
        input.numel() == output.numel() * size_, "ffreduce reduce_scatter_single: the input must hold ", size_, " x ",
        output.numel(), " elements, it holds ", input.numel());
    call.reads(input);
    call.writes(output);
    setOp(call, op);
    return call;
  }

  // Calls add(elements, offset) for every rank's block; no sizes means equal blocks.
  template <typename Add>
  void splits(const Tensor& tensor, const std::vector<int64_t>& sizes, const char* what, Add add) const {
    const int64_t rows = tensor.dim() ? tensor.size(0) : 1;
    const int64_t row = rows ? tensor.numel() / rows : 0;
    if (sizes.empty()) {
      TORCH_CHECK_VALUE(
          rows % size_ == 0, "ffreduce all_to_all_single: the ", what, "'s first dimension (", rows,
          ") is not a multiple of the group size ", size_, "; pass split sizes");
      add(tensor.numel(), 0);
      return;
    }
    TORCH_CHECK_VALUE(
        sizes.size() == size_t(size_), "ffreduce all_to_all_single: needs one ", what, " split size per rank (", size_,
        "), got ", sizes.size());
    int64_t at = 0;
    for (int64_t n : sizes) {
      TORCH_CHECK_VALUE(n >= 0, "ffreduce all_to_all_single: negative ", what, " split size ", n);
      add(n * row, at * row);
      at += n;
    }
    TORCH_CHECK_VALUE(
        at == rows, "ffreduce all_to_all_single: the ", what, " split sizes sum to ", at,
        ", but the first dimension is ", rows);
  }

  // An empty message, for monitoredBarrier.
  c10::intrusive_ptr<c10d::Work> point(ffr_op_kind kind, int peer, uint32_t tag, milliseconds limit) {
    Call call(kind, "monitored_barrier");
    call.args.peer = peer;
    call.args.tag = tag;
    call.args.dtype = FFR_U8;
    const ffr_buf nothing{nullptr, 0};
    (kind == FFR_SEND ? call.in : call.out).push_back(nothing);
    return start(kind == FFR_SEND ? OpType::SEND : OpType::RECV, std::move(call), Plain{limit, true}, {});
  }

  template <typename O>
  c10::intrusive_ptr<c10d::Work> start(OpType type, Call&& call, const O& opts, const Tensors& inputs) {
    return submit(type, &call, 1, opts.timeout, opts.asyncOp, inputs);
  }

  template <typename O>
  c10::intrusive_ptr<c10d::Work> startAll(
      OpType type, std::vector<Call>&& calls, const O& opts, const Tensors& inputs) {
    TORCH_CHECK_VALUE(!calls.empty(), "ffreduce: a coalesced operation needs at least one tensor");
    return submit(type, calls.data(), calls.size(), opts.timeout, opts.asyncOp, inputs);
  }

  c10::intrusive_ptr<c10d::Work> submit(
      OpType type, Call* calls, size_t n, milliseconds timeout, bool asyncOp, const Tensors& inputs) {
    auto comm = this->comm();
    const int kind = calls[0].args.kind;
    auto work = c10::make_intrusive<FireflyWork>(
        rank_, type, titles_[kind], inputs.empty() ? std::nullopt : std::optional<Tensors>(inputs), kind, n, shared_);
    if (timeout == c10d::kUnsetTimeout || timeout.count() <= 0) timeout = milliseconds(timeoutMs_.load());
    timeout += shared_->extensions.take(work->extensions_);
    work->timeout_ = timeout;
    uint64_t bytes = 0;
    for (size_t i = 0; i < n; i++) {
      bytes += std::max(calls[i].bytesIn, calls[i].bytesOut);
      for (auto& tensor : calls[i].keep) work->keep_.push_back(std::move(tensor));
      for (auto& tensor : calls[i].results) work->results_.push_back(std::move(tensor));
    }
    work->ops_.reserve(n);
    shared_->counters.started(kind, bytes);
    for (size_t i = 0; i < n; i++) {
      ffr_args& args = calls[i].args;
      args.in = calls[i].in.data();
      args.in_n = calls[i].in.size();
      args.out = calls[i].out.data();
      args.out_n = calls[i].out.size();
      args.timeout_ms = uint64_t(timeout.count());
      args.flags = FFR_SUBMIT_INLINE | (asyncOp ? 0 : FFR_SUBMIT_WAIT_FOLLOWS);
      args.done = &FireflyWork::done;
      args.done_ctx = c10::intrusive_ptr<FireflyWork>(work).release();
      ffr_op* op = nullptr;
      const ffr_status status = ffr_submit(comm.get(), &args, &op);
      if (status == FFR_OK) {
        work->ops_.push_back(op);
        continue;
      }
      const std::string message = lastError();
      c10::intrusive_ptr<FireflyWork>::reclaim(static_cast<FireflyWork*>(args.done_ctx));
      work->endParts(n - i, status, message.c_str());
      if (i == 0) std::rethrow_exception(asException(status, message));
      break;
    }
    return work;
  }

  const std::string name_;
  std::atomic<int64_t> timeoutMs_;
  std::shared_ptr<Shared> shared_;
  const char* titles_[kKinds];
  std::shared_ptr<Holder> holder_;
};

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native part of firefly's torch backend.";
  if (ffr_abi_version() != FFR_ABI_VERSION)
    throw std::runtime_error(
        "libffreduce.so has ABI version " + std::to_string(ffr_abi_version()) + ", this build wants " +
        std::to_string(FFR_ABI_VERSION) + ": install firefly again");
  py::module_::import("torch._C._distributed_c10d");
  m.def("version", [] { return std::string(ffr_version()); }, "Version of libffreduce.");
  m.def("shutdown_all", &shutdownAll, py::call_guard<py::gil_scoped_release>(), "Shuts every group down.");
  py::class_<FireflyBackend, c10::intrusive_ptr<FireflyBackend>, c10d::Backend>(m, "FireflyBackend")
      .def(py::init<const c10::intrusive_ptr<c10d::Store>&, int, int, milliseconds, std::string, const std::string&>(),
           py::arg("store"), py::arg("rank"), py::arg("size"), py::arg("timeout"), py::arg("name") = "ffreduce",
           py::arg("group_name") = "default", py::call_guard<py::gil_scoped_release>())
      .def("stats", &FireflyBackend::stats, "Counters of this group as a dict.");
}
