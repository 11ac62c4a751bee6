//! Memory for contributions under way: one block, kept between operations so that its pages stay
//! mapped and, where peers are reached by RDMA, registered: contributions then land in it without
//! a copy. Collectives of a group run one after the other, so one block is enough.

use firefly_net::{Fabric, Region};

/// Larger blocks are given back after use.
const KEPT_BYTES: usize = 32 << 20;
/// A registered block is at least this large: registering costs more than mapping, so it should
/// not happen again for each operation that is a little larger than all before.
const LEAST_REGISTERED: usize = 1 << 20;

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
    /// Where blocks are registered, if anywhere.
    fabric: Option<Fabric>,
    /// Of `lines`. Declared, and dropped, before them: afterwards no device touches them, whatever
    /// links are still open.
    region: Option<Region>,
    lines: Vec<Line>,
}

impl Scratch {
    /// Blocks are registered with the devices of `fabric`.
    pub(crate) fn new(fabric: Option<Fabric>) -> Self {
        Self { fabric, region: None, lines: Vec::new() }
    }

    /// `bytes` of memory aligned to 64, valid until the next call of `take` or `trim`.
    pub(crate) fn take(&mut self, bytes: usize) -> *mut u8 {
        if self.lines.len() * 64 < bytes {
            let bytes = match self.fabric {
                Some(_) => bytes.next_power_of_two().max(LEAST_REGISTERED),
                None => bytes,
            };
            self.region = None;
            self.lines = vec![Line([0; 64]); bytes.div_ceil(64)];
            self.register();
        }
        self.lines.as_mut_ptr().cast()
    }

    fn register(&mut self) {
        let Some(fabric) = &self.fabric else { return };
        let (ptr, len) = (self.lines.as_mut_ptr().cast(), self.lines.len() * 64);
        // SAFETY: the region is dropped before the block (`take`, `trim`, order of the fields), and
        // the block is used by raw pointers only.
        match unsafe { Region::register(fabric, ptr, len) } {
            Ok(region) => self.region = Some(region),
            Err(error) => {
                tracing::warn!(%error, len, "staging memory is not registered: payloads are copied instead");
                // Asked once; the limit will not go away.
                self.fabric = None;
            }
        }
    }

    /// Called when no operation uses the block.
    pub(crate) fn trim(&mut self) {
        if self.lines.len() * 64 > KEPT_BYTES {
            self.region = None;
            self.lines = Vec::new();
        }
    }
}
