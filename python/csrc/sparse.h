// All-reduce (SUM) of sparse COO tensors, in two steps: every rank learns how much the others have,
// then they exchange indices and values, and each adds up along the core's canonical tree, so that all
// get the same bits.
//
// The first step is an all-gather, matched by issue order. The second is submitted from its callback,
// when later collectives may have been issued already, so it is point-to-point with a tag of its own.
#pragma once

#include <c10/core/GradMode.h>

#include "buffers.h"
#include "work.h"

namespace firefly {

class SparseWork : public BaseWork {
 public:
  static c10::intrusive_ptr<c10d::Work> start(
      const std::shared_ptr<ffr_comm>& comm, Tensor& tensor, int rank, int size, uint32_t number, const char* title,
      milliseconds timeout, std::shared_ptr<Shared> shared) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        tensor.layout() == at::kSparse, "ffreduce allreduce: only dense and sparse COO tensors are supported, got layout ",
        tensor.layout(), "; call .to_sparse() first");
    TORCH_CHECK_VALUE(
        tensor.device().is_cpu(), "ffreduce allreduce: only CPU tensors are supported, got one on ", tensor.device(),
        "; move it with .cpu()");
    TORCH_CHECK_VALUE(
        tensor.dim() <= kMostDims, "ffreduce allreduce: a sparse tensor may have at most ", kMostDims,
        " dimensions, this one has ", tensor.dim());
    auto work = c10::make_intrusive<SparseWork>(comm, tensor, rank, size, number, title, timeout, std::move(shared));
    work->gatherShapes();
    return work;
  }

  SparseWork(const std::shared_ptr<ffr_comm>& comm, Tensor tensor, int rank, int size, uint32_t number, const char* title,
             milliseconds timeout, std::shared_ptr<Shared> shared)
      : BaseWork(rank, c10d::OpType::_ALLREDUCE_SPARSE, title, Tensors{tensor}, std::move(shared)),
        comm_(comm), tensor_(std::move(tensor)), size_(size), tag_(kSparseTag + 2 * number),
        deadline_(steady_clock::now() + timeout) {
    timeout_ = timeout;
    results_ = {tensor_};
    at::NoGradGuard noGrad;
    const Tensor mine = tensor_.coalesce();
    shapes_ = at::zeros({size, kShape}, at::kLong);
    indices_.resize(size);
    values_.resize(size);
    indices_[rank_] = mine.indices().contiguous();
    values_[rank_] = mine.values().contiguous();
    auto shape = shapes_.accessor<int64_t, 2>()[rank_];
    shape[0] = mine._nnz();
    shape[1] = mine.sparse_dim();
    shape[2] = mine.dense_dim();
    shape[3] = int64_t(mine.scalar_type());
    for (int64_t d = 0; d < mine.dim(); d++) shape[4 + d] = mine.size(d);
  }

  ~SparseWork() override {
    ffr_op_free(first_);
  }

  bool isCompleted() override {
    if (first_) ffr_op_test(first_);
    return Work::isCompleted();
  }

  bool wait(milliseconds timeout) override {
    // Drives the first step; the second is the progress thread's, as its operations are made there.
    if (first_ && !Work::isCompleted()) ffr_op_wait(first_, timeout == kNoTimeout ? -1 : timeout.count());
    return waitForCompletion(timeout, "sparse all_reduce");
  }

 private:
  static constexpr int64_t kMostDims = 12;
  static constexpr int64_t kShape = 4 + kMostDims;

  void gatherShapes() {
    shared_->counters.started(FFR_ALLREDUCE, indices_[rank_].nbytes() + values_[rank_].nbytes());
    ffr_buf in{shapes_[rank_].data_ptr(), uint64_t(kShape)};
    ffr_buf out{shapes_.data_ptr(), uint64_t(kShape * size_)};
    ffr_args args = arguments(FFR_ALLGATHER, FFR_I64);
    args.in = &in;
    args.in_n = 1;
    args.out = &out;
    args.out_n = 1;
    const ffr_status status = submit(args, &SparseWork::shapesDone, &first_);
    if (status != FFR_OK) {
      const std::string message = lastError();
      shared_->counters.ended(FFR_ALLREDUCE);
      std::rethrow_exception(asException(status, message));
    }
  }

  static void shapesDone(void* context, ffr_status status, const char* message) {
    auto work = c10::intrusive_ptr<SparseWork>::reclaim(static_cast<SparseWork*>(context));
    insideCallback([&] {
      if (status != FFR_OK)
        work->end(asException(status, message));
      else
        work->exchange();
      work.reset();
    });
  }

  void exchange() {
    auto shapes = shapes_.accessor<int64_t, 2>();
    for (int peer = 0; peer < size_; peer++)
      for (int64_t i = 1; i < kShape; i++)
        if (shapes[peer][i] != shapes[rank_][i])
          return end(asException(
              FFR_ERR_MISMATCH, c10::str("ffreduce sparse allreduce: rank ", rank_, " and rank ", peer,
                                         " gave tensors of different shape or type")));
    // One count for this function, so that the end cannot come before everything is submitted.
    pending_ = 1 + 4 * (size_ - 1);
    for (int peer = 0; peer < size_; peer++) {
      if (peer == rank_) continue;
      const int64_t nnz = shapes[peer][0];
      auto sizes = values_[rank_].sizes().vec();
      sizes[0] = nnz;
      indices_[peer] = at::empty({shapes[peer][1], nnz}, at::kLong);
      values_[peer] = at::empty(sizes, values_[rank_].options());
      move(FFR_RECV, peer, tag_, indices_[peer]);
      move(FFR_RECV, peer, tag_ + 1, values_[peer]);
      move(FFR_SEND, peer, tag_, indices_[rank_]);
      move(FFR_SEND, peer, tag_ + 1, values_[rank_]);
    }
    part(FFR_OK, "");
  }

  void move(ffr_op_kind kind, int peer, uint32_t tag, const Tensor& tensor) {
    const uint64_t bytes = tensor.nbytes();
    const ffr_buf buffer{bytes ? tensor.data_ptr() : nullptr, bytes};
    ffr_args args = arguments(kind, FFR_U8);
    args.peer = peer;
    args.tag = tag;
    (kind == FFR_SEND ? args.in : args.out) = &buffer;
    (kind == FFR_SEND ? args.in_n : args.out_n) = 1;
    const ffr_status status = submit(args, &SparseWork::moved, nullptr);
    if (status != FFR_OK) part(status, lastError().c_str());
  }

  static void moved(void* context, ffr_status status, const char* message) {
    auto work = c10::intrusive_ptr<SparseWork>::reclaim(static_cast<SparseWork*>(context));
    insideCallback([&] {
      work->part(status, message);
      work.reset();
    });
  }

  void part(ffr_status status, const char* message) {
    if (status != FFR_OK) {
      std::lock_guard<std::mutex> lock(errorMutex_);
      if (!firstError_) firstError_ = asException(status, message);
    }
    if (pending_.fetch_sub(1) != 1) return;
    if (firstError_) return end(firstError_);
    try {
      at::NoGradGuard noGrad;
      tensor_.copy_(sum(0, size_));
      end(nullptr);
    } catch (...) {
      end(std::current_exception());
    }
  }

  // The canonical tree: the largest power of two below the number of ranks goes to the left.
  Tensor sum(int from, int ranks) {
    if (ranks == 1)
      return at::_sparse_coo_tensor_unsafe(indices_[from], values_[from], tensor_.sizes(), values_[from].options().layout(at::kSparse))
          ._coalesced_(true);
    int left = 1;
    while (left * 2 < ranks) left *= 2;
    return at::add(sum(from, left), sum(from + left, ranks - left)).coalesce();
  }

  void end(std::exception_ptr error) {
    shared_->counters.ended(FFR_ALLREDUCE);
    indices_.clear();
    values_.clear();
    complete(error);
  }

  ffr_args arguments(ffr_op_kind kind, ffr_dtype dtype) const {
    ffr_args args{};
    args.struct_size = sizeof args;
    args.kind = kind;
    args.dtype = dtype;
    args.timeout_ms = std::max<int64_t>(
        1, std::chrono::duration_cast<milliseconds>(deadline_ - steady_clock::now()).count());
    return args;
  }

  ffr_status submit(ffr_args& args, ffr_done_fn done, ffr_op** op) {
    const auto comm = comm_.lock();
    if (!comm) return FFR_ERR_ABORTED;
    args.done = done;
    args.done_ctx = c10::intrusive_ptr<SparseWork>::reclaim_copy(this).release();
    const ffr_status status = ffr_submit(comm.get(), &args, op);
    if (status != FFR_OK) c10::intrusive_ptr<SparseWork>::reclaim(static_cast<SparseWork*>(args.done_ctx));
    return status;
  }

  std::weak_ptr<ffr_comm> comm_; // weak: shutdown() ends a group whatever is under way
  Tensor tensor_, shapes_;
  const int size_;
  const uint32_t tag_;
  const steady_clock::time_point deadline_;
  ffr_op* first_ = nullptr; // written before the Work is handed out
  Tensors indices_, values_;
  std::atomic<int> pending_{0};
  std::mutex errorMutex_; // firstError_ until the last part
  std::exception_ptr firstError_;
};

} // namespace firefly
