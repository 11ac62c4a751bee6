//! Memory for contributions under way: one block, kept between operations so that its pages stay
//! mapped. Collectives of a group run one after the other, so one block is enough.

/// Larger blocks are given back after use.
const KEPT_BYTES: usize = 32 << 20;

#[repr(align(64))]
#[derive(Clone, Copy)]
pub(crate) struct Line(#[expect(dead_code, reason = "only its size and alignment count")] [u8; 64]);

/// Memory of an operation's own, aligned to 64.
pub(crate) fn lines(bytes: usize) -> Vec<Line> {
    vec![Line([0; 64]); bytes.div_ceil(64)]
}

/// See the module.
#[derive(Default)]
pub(crate) struct Scratch {
    lines: Vec<Line>,
}

impl Scratch {
    /// `bytes` of memory aligned to 64, valid until the next call of `take` or `trim`.
    pub(crate) fn take(&mut self, bytes: usize) -> *mut u8 {
        let lines = bytes.div_ceil(64);
        if self.lines.len() < lines {
            self.lines = vec![Line([0; 64]); lines];
        }
        self.lines.as_mut_ptr().cast()
    }

    /// Called when no operation uses the block.
    pub(crate) fn trim(&mut self) {
        if self.lines.len() * 64 > KEPT_BYTES {
            self.lines = Vec::new();
        }
    }
}
