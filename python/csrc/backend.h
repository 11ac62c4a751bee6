// The c10d::Backend: one method per call of torch's contract, each a translation.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <set>

#include "bootstrap.h"
#include "buffers.h"
#include "comm.h"
#include "monitored_barrier.h"
#include "sparse.h"

namespace firefly {

using c10d::OpType;

inline const char* interned(const std::string& text) { // profiler titles must outlive their events
  static std::mutex mutex;
  static auto* const texts = new std::set<std::string>;
  std::lock_guard<std::mutex> guard(mutex);
  return texts->insert(text).first->c_str();
}

class FireflyBackend : public c10d::Backend {
 public:
  // Forms the group: blocks until all ranks are there. `name` is what the group was asked for by.
  FireflyBackend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, milliseconds timeout,
                 std::string name, const std::string& group)
      : FireflyBackend(
            Meeting(size > 1 ? ownConnection(*store, timeout) : store, group, rank, size, timeout).form(), rank, size,
            timeout, std::move(name)) {}

  bool supportsSplitting() const override {
    return true;
  }

  // Forms a group of `ranks` of this group, through this group; collective over all its ranks, and
  // nothing for those that are not in `ranks`.
  c10::intrusive_ptr<Backend> split(
      const c10::intrusive_ptr<c10d::Store>& /*store*/, const std::vector<int>& ranks,
      const c10::intrusive_ptr<Options>& opts) override {
    const milliseconds timeout = opts ? opts->timeout : milliseconds(timeoutMs_.load());
    return splitOff(ranks, timeout, name_, opts && !opts->group_name.empty() ? opts->group_name : getGroupUid() + ":split");
  }

  c10::intrusive_ptr<FireflyBackend> splitOff(
      const std::vector<int>& ranks, milliseconds timeout, const std::string& name, const std::string& group) {
    const bool in = std::find(ranks.begin(), ranks.end(), rank_) != ranks.end();
    const std::vector<int32_t> members(in ? ranks.begin() : ranks.end(), ranks.end());
    ffr_comm* comm = nullptr;
    const ffr_status status = ffr_comm_split(
        this->comm().get(), group.c_str(), members.data(), members.size(), timeout.count(), &comm);
    if (status != FFR_OK) throwLast(status);
    if (!comm) return nullptr;
    return c10::make_intrusive<FireflyBackend>(comm, ffr_comm_rank(comm), ffr_comm_size(comm), timeout, name);
  }

  // A rank that takes no part in a split of this group must still be there for it.
  void splitNothing() {
    ffr_comm* none = nullptr;
    const ffr_status status = ffr_comm_split(comm().get(), "", nullptr, 0, timeoutMs_.load(), &none);
    if (status != FFR_OK) throwLast(status);
  }

  // Takes over a formed group.
  FireflyBackend(ffr_comm* comm, int rank, int size, milliseconds timeout, std::string name)
      : Backend(rank, size), name_(std::move(name)), timeoutMs_(timeout.count()),
        shared_(std::make_shared<Shared>()), holder_(std::make_shared<Holder>(comm)) {
    for (int kind = 0; kind < kKinds; kind++) titles_[kind] = interned(name_ + ":" + kKindNames[kind]);
    init();
    Live::add(holder_);
  }

  const std::string getBackendName() const override {
    return kBackendName;
  }

  c10::intrusive_ptr<Options> getBackendOptions() override {
    auto options = c10::make_intrusive<Options>(kBackendName, milliseconds(timeoutMs_.load()));
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

  // -- hooks, which torch's flight recorder uses

  bool supportsAbortHooks() const override {
    return true;
  }
  void registerAbortHook(int64_t id, c10d::AbortHook hook) override {
    shared_->hooks.add(id, std::move(hook));
  }
  void unregisterAbortHook(int64_t id) override {
    shared_->hooks.dropAbort(id);
  }
  bool supportsCompletionHooks() const override {
    return true;
  }
  void registerCompletionHook(int64_t id, c10d::CompletionHook hook) override {
    shared_->hooks.add(id, std::move(hook));
  }
  void unregisterCompletionHook(int64_t id) override {
    shared_->hooks.dropCompletion(id);
  }

  // -- coalescing: operations go off as they come, and are waited for together

  bool supportsCoalescing() const override {
    return true;
  }
  void startCoalescing() override {
    coalescing_ = true;
    coalesced_.clear();
  }
  c10::intrusive_ptr<c10d::Work> endCoalescing() override {
    coalescing_ = false;
    return c10::make_intrusive<CoalescedWork>(rank_, std::exchange(coalesced_, {}));
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
    Tensor& tensor = single(tensors, "allreduce");
    if (tensor.defined() && tensor.layout() != at::kStrided) return allreduce_sparse(tensors, opts);
    Call call(FFR_ALLREDUCE, "allreduce");
    call.updates(tensor);
    setOp(call, opts.reduceOp);
    return start(OpType::ALLREDUCE, std::move(call), opts, tensors);
  }

  c10::intrusive_ptr<c10d::Work> allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& opts) override {
    TORCH_CHECK_NOT_IMPLEMENTED(
        opts.reduceOp == c10d::ReduceOp::SUM, "ffreduce allreduce: sparse tensors can only be summed; "
        "call .to_dense() first for other reductions");
    const milliseconds timeout = opts.timeout == c10d::kUnsetTimeout || opts.timeout.count() <= 0
        ? milliseconds(timeoutMs_.load()) : opts.timeout;
    return gathered(SparseWork::start(
        comm(), single(tensors, "allreduce_sparse"), rank_, size_, sparseNumber_++ & 0x1fffffff,
        titles_[FFR_ALLREDUCE], timeout, shared_));
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

  void monitoredBarrier(const c10d::BarrierOptions& opts, bool waitAllRanks) override {
    const milliseconds usual(timeoutMs_.load());
    const milliseconds limit = opts.timeout == c10d::kUnsetTimeout ? usual : opts.timeout;
    MonitoredBarrier::run(
        rank_, size_, limit, usual, waitAllRanks,
        [this](ffr_op_kind kind, int peer, uint32_t tag, milliseconds limit) { return point(kind, peer, tag, limit); });
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
    if (status != FFR_OK) throwLast(status);
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
    return gathered(work);
  }

  // Notes the Work while operations are coalesced.
  c10::intrusive_ptr<c10d::Work> gathered(c10::intrusive_ptr<c10d::Work> work) {
    if (coalescing_) coalesced_.push_back(work);
    return work;
  }

  const std::string name_;
  std::atomic<int64_t> timeoutMs_;
  std::shared_ptr<Shared> shared_;
  const char* titles_[kKinds];
  std::shared_ptr<Holder> holder_;
  std::atomic<uint32_t> sparseNumber_{0}; // issue order, hence the same on all ranks
  // Coalescing is a matter of one thread, as with every backend of torch.
  bool coalescing_ = false;
  std::vector<c10::intrusive_ptr<c10d::Work>> coalesced_;
};

} // namespace firefly
