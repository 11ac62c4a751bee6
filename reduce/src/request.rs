//! From what a caller asks to how it is carried out: checks, the operation's descriptor, and the
//! choice of algorithm. All ranks choose alike, because the choice depends only on the
//! descriptor and on what the group's forming has settled for all ranks.

use crate::ReduceError;
use crate::cutoffs::Algorithm;
use crate::dtype::{DType, ReduceOp};
use crate::header::{Descriptor, NO_REDOP, NO_ROOT, OpKind};
use crate::kernels::{Stage, partial};
use crate::ops::Body;
use crate::ops::doubling::{Part, Rounds};
use crate::ops::exchange::{Block, Exchange, Finish, OwnBlock};
use crate::ops::levels::{Task, TwoLevels};
use crate::ops::reduce::{Slice, Wanted, WireReduce};
use crate::options::Options;
use crate::placement::Placement;
use crate::shm::arena::{ArenaOp, Mode};
use std::sync::Arc;

/// Up to this many bytes (times ranks) a reduction over links gathers every input everywhere.
const DIRECT_BYTES: usize = 64 << 10;
/// Largest input of such a reduction: one eager message.
const DIRECT_INPUT_BYTES: usize = crate::wire::EAGER_BYTES;

/// A caller's memory: address and number of elements.
#[derive(Clone, Copy, Debug)]
pub struct RawBuf {
    /// First element; may be null when `count` is 0.
    pub ptr: *mut u8,
    /// Elements.
    pub count: usize,
}

/// Which operation; the memory goes into [`Request`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operation {
    /// Every rank gets the reduction of all inputs.
    AllReduce(ReduceOp),
    /// `root` gets the reduction of all inputs.
    Reduce {
        /// How.
        op: ReduceOp,
        /// Who gets it.
        root: u32,
    },
    /// Every rank gets `root`'s input.
    Broadcast {
        /// Whose.
        root: u32,
    },
    /// Every rank gets every input.
    AllGather,
    /// Rank i gets the reduction of everybody's block i.
    ReduceScatter(ReduceOp),
    /// Rank i gets everybody's block i.
    AllToAll,
    /// `root` gets every input.
    Gather {
        /// Who gets them.
        root: u32,
    },
    /// Rank i gets `root`'s block i.
    Scatter {
        /// Whose.
        root: u32,
    },
    /// To one rank.
    Send {
        /// Whom.
        peer: u32,
        /// Matches the receiver's.
        tag: u32,
    },
    /// From one rank.
    Recv {
        /// Whom.
        peer: u32,
        /// Matches the sender's.
        tag: u32,
    },
    /// From whoever comes first.
    RecvAny {
        /// Matches the sender's.
        tag: u32,
    },
    /// Nobody returns before everybody came.
    Barrier,
}

/// An operation with its memory. `input` and `output` are either one buffer or one per rank; see
/// the table in `ffreduce.h`.
pub struct Request<'a> {
    /// Which.
    pub operation: Operation,
    /// Type of the elements.
    pub dtype: DType,
    /// What this rank contributes.
    pub input: &'a [RawBuf],
    /// What this rank gets.
    pub output: &'a [RawBuf],
}

/// A checked request.
pub(crate) enum Plan {
    Collective { descriptor: Descriptor, body: Body },
    Send { peer: u32, tag: u32, ptr: *const u8, len: usize },
    Recv { peer: Option<u32>, tag: u32, ptr: *mut u8, len: usize },
}

// SAFETY: the raw pointers are memory of a submitted operation, handed over with it.
unsafe impl Send for Plan {}

/// The group as far as plans depend on it.
pub(crate) struct Shape {
    pub(crate) rank: u32,
    pub(crate) size: u32,
    /// All ranks share memory, and may use the staging slots.
    pub(crate) arena: bool,
    pub(crate) placement: Placement,
    pub(crate) options: Options,
    /// All ranks, in order.
    pub(crate) everyone: Arc<[u32]>,
    /// The nodes' leaders, where all-reduce may go in two levels.
    pub(crate) leaders: Option<Arc<[u32]>>,
}

impl Shape {
    pub(crate) fn new(rank: u32, size: u32, arena: bool, placement: Placement, options: Options) -> Self {
        let two_levels = placement.two_levels() && !options.checksums;
        let leaders = two_levels.then(|| placement.leaders().into());
        Self { rank, size, arena, placement, options, everyone: (0..size).collect(), leaders }
    }
}

fn invalid(detail: String) -> ReduceError {
    ReduceError::Invalid { detail }
}

impl Request<'_> {
    fn check_buffers(&self) -> Result<(), ReduceError> {
        for (what, buffers) in [("input", self.input), ("output", self.output)] {
            for buffer in buffers {
                let fits =
                    buffer.count.checked_mul(self.dtype.size()).is_some_and(|b| b <= isize::MAX as usize);
                if !fits || (buffer.ptr.is_null() && buffer.count > 0) {
                    return Err(invalid(format!(
                        "the {what} of {} elements at {:?} is no memory",
                        buffer.count, buffer.ptr
                    )));
                }
                if buffer.count > 0 && !(buffer.ptr as usize).is_multiple_of(self.dtype.align()) {
                    return Err(invalid(format!(
                        "the {what} at {:?} is not aligned for {}; copy it to aligned memory first",
                        buffer.ptr, self.dtype
                    )));
                }
            }
        }
        Ok(())
    }

    fn one(&self, what: &str, buffers: &[RawBuf]) -> Result<RawBuf, ReduceError> {
        match buffers {
            [one] => Ok(*one),
            _ => Err(invalid(format!("this operation takes one {what} buffer, not {}", buffers.len()))),
        }
    }

    fn equal(&self, input: RawBuf, output: RawBuf) -> Result<usize, ReduceError> {
        if input.count != output.count {
            return Err(invalid(format!(
                "input and output must have equally many elements, not {} and {}",
                input.count, output.count
            )));
        }
        Ok(input.count)
    }

    /// One buffer per rank, from one contiguous buffer or from N.
    fn blocks(&self, what: &str, buffers: &[RawBuf], size: u32) -> Result<Vec<RawBuf>, ReduceError> {
        let n = size as usize;
        if buffers.len() == n && n > 1 {
            return Ok(buffers.to_vec());
        }
        let whole = self.one(what, buffers)?;
        if !whole.count.is_multiple_of(n) {
            return Err(invalid(format!(
                "the {what} of {} elements does not divide into {n} equal blocks; pass {n} buffers instead",
                whole.count
            )));
        }
        let each = whole.count / n;
        let bytes = each * self.dtype.size();
        // wrapping_add: a null pointer of an empty buffer stays as it is.
        Ok((0..n).map(|i| RawBuf { ptr: whole.ptr.wrapping_add(i * bytes), count: each }).collect())
    }

    fn root(&self, root: u32, size: u32) -> Result<u32, ReduceError> {
        if root < size {
            Ok(root)
        } else {
            Err(invalid(format!("root {root} is no rank of a group of {size}")))
        }
    }

    /// Checks the request and chooses how to carry it out.
    pub(crate) fn plan(&self, shape: &Shape) -> Result<Plan, ReduceError> {
        self.check_buffers()?;
        let Shape { rank: me, size, arena: slots, .. } = *shape;
        let dsize = self.dtype.size();
        let n = size as usize;
        let arena = slots && n > 1 && ArenaOp::fits(n);
        let others = || (0..size).filter(move |&r| r != me);
        let describe = |op: OpKind, redop: Option<ReduceOp>, root: Option<u32>, count: usize| Descriptor {
            op: op as u8,
            dtype: self.dtype as u8,
            redop: redop.map_or(NO_REDOP, ReduceOp::code),
            root: root.unwrap_or(NO_ROOT),
            count: count as u64,
        };
        let block = |peer: u32, buf: RawBuf| Block { peer, ptr: buf.ptr, len: buf.count * dsize };
        let (descriptor, body) = match self.operation {
            Operation::AllReduce(op) => {
                op.check(self.dtype)?;
                let (input, output) = (self.one("input", self.input)?, self.one("output", self.output)?);
                let count = self.equal(input, output)?;
                let descriptor = describe(OpKind::AllReduce, Some(op), None, count);
                let bytes = count * dsize;
                let body = if arena {
                    Body::Arena(ArenaOp::new(
                        Mode::all_reduce(bytes, n),
                        self.dtype,
                        op,
                        count,
                        vec![input.ptr.cast_const()],
                        vec![output.ptr],
                    ))
                } else if direct(bytes, n) && (n == 1 || self.algorithm(shape, bytes) == Algorithm::Gather) {
                    let to_all: Vec<_> = others().map(|r| block(r, input)).collect();
                    let finish =
                        Finish { dtype: self.dtype, op, count, input: input.ptr, output: output.ptr };
                    gather_and_reduce(to_all, others().collect(), finish)
                } else {
                    self.between_nodes(shape, op, input.ptr, output.ptr, count)
                };
                (descriptor, body)
            }
            Operation::Reduce { op, root } => {
                op.check(self.dtype)?;
                let root = self.root(root, size)?;
                let input = self.one("input", self.input)?;
                let output =
                    if me == root { self.one("output", self.output)?.ptr } else { std::ptr::null_mut() };
                if me == root {
                    self.equal(input, self.output[0])?;
                }
                let count = input.count;
                let descriptor = describe(OpKind::Reduce, Some(op), Some(root), count);
                let body = if arena {
                    Body::Arena(ArenaOp::new(
                        Mode::Reduce { root: root as usize },
                        self.dtype,
                        op,
                        count,
                        vec![input.ptr.cast_const()],
                        vec![output],
                    ))
                } else if direct(count * dsize, n) {
                    let (sends, from) = if me == root {
                        (Vec::new(), others().collect())
                    } else {
                        (vec![block(root, input)], Vec::new())
                    };
                    let finish = Finish { dtype: self.dtype, op, count, input: input.ptr, output };
                    gather_and_reduce(sends, from, finish)
                } else {
                    Body::Reduce(Box::new(WireReduce::new(
                        Stage::whole(self.dtype, op, n),
                        op.factor(),
                        shape.everyone.clone(),
                        0,
                        slices(input.ptr, |_| output, count, dsize, n),
                        Wanted::By(root),
                    )))
                };
                (descriptor, body)
            }
            Operation::ReduceScatter(op) => {
                op.check(self.dtype)?;
                let blocks = self.blocks("input", self.input, size)?;
                let output = self.one("output", self.output)?;
                self.equal(blocks[me as usize], output)?;
                let even = blocks.iter().all(|b| b.count == output.count);
                let total: usize = blocks.iter().map(|b| b.count).sum();
                let descriptor = describe(OpKind::ReduceScatter, Some(op), None, total);
                let body = if n == 1 {
                    let finish = Finish {
                        dtype: self.dtype,
                        op,
                        count: output.count,
                        input: blocks[0].ptr,
                        output: output.ptr,
                    };
                    gather_and_reduce(Vec::new(), Vec::new(), finish)
                } else if arena && even {
                    Body::Arena(ArenaOp::new(
                        Mode::ReduceScatter,
                        self.dtype,
                        op,
                        output.count,
                        blocks.iter().map(|b| b.ptr.cast_const()).collect(),
                        vec![output.ptr],
                    ))
                } else {
                    let slices = (0..n)
                        .map(|r| Slice {
                            input: blocks[r].ptr,
                            output: if r == me as usize { output.ptr } else { std::ptr::null_mut() },
                            count: blocks[r].count,
                        })
                        .collect();
                    Body::Reduce(Box::new(WireReduce::new(
                        Stage::whole(self.dtype, op, n),
                        op.factor(),
                        shape.everyone.clone(),
                        0,
                        slices,
                        Wanted::ByOwner,
                    )))
                };
                (descriptor, body)
            }
            Operation::Broadcast { root } => {
                let root = self.root(root, size)?;
                let (input, output) = if me == root {
                    let input = self.one("input", self.input)?;
                    let output = self.output.first().copied().unwrap_or(input);
                    self.equal(input, output)?;
                    (input, output)
                } else {
                    let output = self.one("output", self.output)?;
                    (output, output)
                };
                let count = output.count;
                let descriptor = describe(OpKind::Broadcast, None, Some(root), count);
                let own = (me == root).then(|| own_block(input, output, dsize));
                let body = if arena {
                    let mut op = ArenaOp::new(
                        Mode::Broadcast { root: root as usize },
                        self.dtype,
                        ReduceOp::Sum,
                        count,
                        vec![input.ptr.cast_const()],
                        vec![output.ptr],
                    );
                    op.own = own;
                    Body::Arena(op)
                } else if me == root {
                    exchange(others().map(|r| block(r, input)).collect(), Vec::new(), own)
                } else {
                    exchange(Vec::new(), vec![block(root, output)], None)
                };
                (descriptor, body)
            }
            Operation::AllGather => {
                let input = self.one("input", self.input)?;
                let blocks = self.blocks("output", self.output, size)?;
                self.equal(input, blocks[me as usize])?;
                let even = blocks.iter().all(|b| b.count == input.count);
                let total: usize = blocks.iter().map(|b| b.count).sum();
                let descriptor = describe(OpKind::AllGather, None, None, total);
                let body = if arena && even {
                    Body::Arena(ArenaOp::new(
                        Mode::AllGather,
                        self.dtype,
                        ReduceOp::Sum,
                        input.count,
                        vec![input.ptr.cast_const()],
                        blocks.iter().map(|b| b.ptr).collect(),
                    ))
                } else {
                    exchange(
                        others().map(|r| block(r, input)).collect(),
                        others().map(|r| block(r, blocks[r as usize])).collect(),
                        Some(own_block(input, blocks[me as usize], dsize)),
                    )
                };
                (descriptor, body)
            }
            Operation::AllToAll => {
                let input = self.blocks("input", self.input, size)?;
                let output = self.blocks("output", self.output, size)?;
                let (mine_in, mine_out) = (input[me as usize], output[me as usize]);
                self.equal(mine_in, mine_out)?;
                let descriptor = describe(OpKind::AllToAll, None, None, 0);
                let body = exchange(
                    others().map(|r| block(r, input[r as usize])).collect(),
                    others().map(|r| block(r, output[r as usize])).collect(),
                    Some(own_block(mine_in, mine_out, dsize)),
                );
                (descriptor, body)
            }
            Operation::Gather { root } => {
                let root = self.root(root, size)?;
                let input = self.one("input", self.input)?;
                let descriptor = describe(OpKind::Gather, None, Some(root), input.count);
                let body = if me == root {
                    let blocks = self.blocks("output", self.output, size)?;
                    for blk in &blocks {
                        self.equal(input, *blk)?;
                    }
                    exchange(
                        Vec::new(),
                        others().map(|r| block(r, blocks[r as usize])).collect(),
                        Some(own_block(input, blocks[me as usize], dsize)),
                    )
                } else {
                    exchange(vec![block(root, input)], Vec::new(), None)
                };
                (descriptor, body)
            }
            Operation::Scatter { root } => {
                let root = self.root(root, size)?;
                let output = self.one("output", self.output)?;
                let descriptor = describe(OpKind::Scatter, None, Some(root), output.count);
                let body = if me == root {
                    let blocks = self.blocks("input", self.input, size)?;
                    for blk in &blocks {
                        self.equal(*blk, output)?;
                    }
                    exchange(
                        others().map(|r| block(r, blocks[r as usize])).collect(),
                        Vec::new(),
                        Some(own_block(blocks[me as usize], output, dsize)),
                    )
                } else {
                    exchange(Vec::new(), vec![block(root, output)], None)
                };
                (descriptor, body)
            }
            Operation::Barrier => {
                let descriptor = Descriptor { dtype: 0, ..describe(OpKind::Barrier, None, None, 0) };
                let empty = RawBuf { ptr: std::ptr::null_mut(), count: 0 };
                let blocks: Vec<_> = others().map(|r| block(r, empty)).collect();
                (descriptor, exchange(blocks.clone(), blocks, None))
            }
            Operation::Send { peer, tag } => {
                let input = self.one("input", self.input)?;
                let peer = self.peer(peer, shape)?;
                return Ok(Plan::Send { peer, tag, ptr: input.ptr, len: input.count * dsize });
            }
            Operation::Recv { peer, tag } => {
                let output = self.one("output", self.output)?;
                let peer = Some(self.peer(peer, shape)?);
                return Ok(Plan::Recv { peer, tag, ptr: output.ptr, len: output.count * dsize });
            }
            Operation::RecvAny { tag } => {
                let output = self.one("output", self.output)?;
                return Ok(Plan::Recv { peer: None, tag, ptr: output.ptr, len: output.count * dsize });
            }
        };
        Ok(Plan::Collective { descriptor, body })
    }

    fn algorithm(&self, shape: &Shape, bytes: usize) -> Algorithm {
        shape.options.cutoffs.choose(bytes)
    }

    /// An all-reduce of which not all ranks share memory.
    fn between_nodes(
        &self,
        shape: &Shape,
        op: ReduceOp,
        input: *mut u8,
        output: *mut u8,
        count: usize,
    ) -> Body {
        let n = shape.size as usize;
        let algorithm = self.algorithm(shape, count * self.dtype.size());
        if let Some(leaders) = &shape.leaders {
            let node = shape.placement.node(shape.rank);
            return Body::Levels(Box::new(TwoLevels::new(Task {
                dtype: self.dtype,
                op,
                algorithm,
                size: n,
                leaders: leaders.clone(),
                local: node.len(),
                leads: node[0] == shape.rank,
                input,
                output,
                count,
            })));
        }
        // In rounds, partial results travel: only where they are no larger, and factors are not theirs.
        let rounds = partial(self.dtype) == self.dtype && !matches!(op, ReduceOp::PremulSum(_)) && count > 0;
        let part = || Part {
            inner: Stage::inner(self.dtype, op),
            root: Stage::root(self.dtype, op, n),
            members: shape.everyone.clone(),
            base: 0,
            input,
            output,
            count,
        };
        match algorithm {
            Algorithm::Doubling if rounds => Body::Rounds(Box::new(Rounds::doubling(part()))),
            Algorithm::Halving if rounds && n.is_power_of_two() => {
                Body::Rounds(Box::new(Rounds::halving(part())))
            }
            _ => Body::Reduce(Box::new(WireReduce::new(
                Stage::whole(self.dtype, op, n),
                op.factor(),
                shape.everyone.clone(),
                0,
                slices(input, |_| output, count, self.dtype.size(), n),
                Wanted::ByAll,
            ))),
        }
    }

    fn peer(&self, peer: u32, shape: &Shape) -> Result<u32, ReduceError> {
        if peer == shape.rank {
            return Err(invalid(format!(
                "rank {peer} cannot send to or receive from itself; copy the memory"
            )));
        }
        if peer >= shape.size {
            return Err(invalid(format!("peer {peer} is no rank of a group of {}", shape.size)));
        }
        Ok(peer)
    }
}

fn direct(bytes: usize, ranks: usize) -> bool {
    ranks == 1 || (bytes <= DIRECT_INPUT_BYTES && bytes * ranks <= DIRECT_BYTES)
}

fn own_block(from: RawBuf, to: RawBuf, dsize: usize) -> OwnBlock {
    OwnBlock { from: from.ptr, to: to.ptr, len: from.count * dsize }
}

fn exchange(sends: Vec<Block>, recvs: Vec<Block>, own: Option<OwnBlock>) -> Body {
    Body::Exchange(Exchange::new(sends, recvs, own, None))
}

fn gather_and_reduce(sends: Vec<Block>, from: Vec<u32>, finish: Finish) -> Body {
    // The receives' memory is scratch, which the operation takes when it begins.
    let recvs = from.into_iter().map(|peer| Block { peer, ptr: std::ptr::null_mut(), len: 0 }).collect();
    Body::Exchange(Exchange::new(sends, recvs, None, Some(finish)))
}

/// Cuts `count` elements into one slice per rank, whole cache lines each except the last.
fn slices(
    input: *const u8,
    output: impl Fn(usize) -> *mut u8,
    count: usize,
    dsize: usize,
    ranks: usize,
) -> Vec<Slice> {
    let line = 64 / dsize;
    let lines = count.div_ceil(line);
    let (each, more) = (lines / ranks, lines % ranks);
    let at = |r: usize| ((r * each + r.min(more)) * line).min(count);
    (0..ranks)
        .map(|r| {
            let (from, to) = (at(r), at(r + 1));
            let out = output(r);
            Slice {
                input: input.wrapping_add(from * dsize),
                output: if out.is_null() { out } else { out.wrapping_add(from * dsize) },
                count: to - from,
            }
        })
        .collect()
}
