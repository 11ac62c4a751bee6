//! Checksums that replicas compare: CRC-32C (Castagnoli; RFC 3720 appendix B.4).

use std::sync::LazyLock;

/// A chunk's checksum is taken over its content padded with zeros to a multiple of this, so that
/// it can be combined from checksums of stored blocks without reading them.
pub const DIGEST_UNIT: usize = 4 << 10;

/// CRC-32C of the bytes of a request.
pub fn payload_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

/// CRC-32C of one unit of zeros: what a hole contributes.
pub static ZERO_UNIT_CRC: LazyLock<u32> = LazyLock::new(|| crc32c::crc32c(&[0; DIGEST_UNIT]));

/// Where each single bit of a checksum ends up after one more unit of bytes: shifting a CRC is
/// linear over GF(2), so this is the whole operator.
static SHIFT_UNIT: LazyLock<[u32; 32]> =
    LazyLock::new(|| std::array::from_fn(|bit| crc32c::crc32c_combine(1 << bit, 0, DIGEST_UNIT)));

/// The operator of `SHIFT_UNIT`, applied 2^k times, for each k: a shift by any number of units takes
/// as many steps as that number has bits.
static SHIFT_POWERS: LazyLock<[[u32; 32]; 32]> = LazyLock::new(|| {
    let mut powers = [*SHIFT_UNIT; 32];
    for k in 1..32 {
        let half = powers[k - 1];
        powers[k] = std::array::from_fn(|bit| apply(&half, half[bit]));
    }
    powers
});

/// Builds a chunk's checksum from the checksums of its units, in order.
#[derive(Clone, Copy, Debug, Default)]
pub struct Digest(u32);

impl Digest {
    /// Appends a unit whose bytes have the CRC-32C `crc`.
    pub fn push(&mut self, crc: u32) {
        self.0 = shift_unit(self.0) ^ crc;
    }

    /// Appends `units` units of zeros.
    pub fn push_zeros(&mut self, units: u32) {
        // The checksum of n units of zeros, by doubling: of two stretches, the first is shifted by
        // the length of the second.
        let (mut zeros, mut stretch) = (0, *ZERO_UNIT_CRC);
        for k in 0..32 {
            if units >> k & 1 != 0 {
                zeros = apply(&SHIFT_POWERS[k], zeros) ^ stretch;
            }
            stretch ^= apply(&SHIFT_POWERS[k], stretch);
        }
        self.0 = shift_units(self.0, units) ^ zeros;
    }

    /// Exchanges the unit that has `behind` units after it: `old` and `new` are its checksums.
    /// The rest of the content need not be known, since a checksum is linear.
    pub fn replace(&mut self, behind: u32, old: u32, new: u32) {
        self.0 ^= shift_units(old ^ new, behind);
    }

    /// Continues from a checksum that [`Digest::finish`] gave.
    pub fn resume(crc: u32) -> Self {
        Self(crc)
    }

    /// The checksum of everything pushed.
    pub fn finish(self) -> u32 {
        self.0
    }

    /// The checksum of a whole chunk's content.
    pub fn of(content: &[u8]) -> u32 {
        let mut digest = Digest::default();
        for unit in content.chunks(DIGEST_UNIT) {
            if unit.len() == DIGEST_UNIT {
                digest.push(crc32c::crc32c(unit));
            } else {
                let zeros = [0; DIGEST_UNIT];
                digest.push(crc32c::crc32c_append(crc32c::crc32c(unit), &zeros[unit.len()..]));
            }
        }
        digest.finish()
    }
}

/// `crc` as if one unit of zero-checksum bytes followed.
pub(crate) fn shift_unit(crc: u32) -> u32 {
    apply(&SHIFT_UNIT, crc)
}

fn shift_units(crc: u32, units: u32) -> u32 {
    (0..32).filter(|k| units >> k & 1 != 0).fold(crc, |crc, k| apply(&SHIFT_POWERS[k], crc))
}

/// A linear operator, given by what becomes of each bit.
fn apply(operator: &[u32; 32], crc: u32) -> u32 {
    let mut out = 0;
    let mut rest = crc;
    while rest != 0 {
        out ^= operator[rest.trailing_zeros() as usize];
        rest &= rest - 1;
    }
    out
}

/// Binds a unit's CRC-32C to where it belongs: the CRC-32C of `seal` followed by the unit.
/// [`unbind`] gets the unit's own CRC-32C back.
pub fn bind(seal: &[u8], crc: u32) -> u32 {
    shift_unit(crc32c::crc32c(seal)) ^ crc
}

/// The inverse of [`bind`] (exclusive or undoes itself).
pub fn unbind(seal: &[u8], bound: u32) -> u32 {
    bind(seal, bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn combined_equals_whole() {
        let content: Vec<u8> = (0..3 * DIGEST_UNIT + 100).map(|i| (i * 7 % 251) as u8).collect();
        let mut padded = content.clone();
        padded.resize(4 * DIGEST_UNIT, 0);
        assert_eq!(Digest::of(&content), crc32c::crc32c(&padded));
        assert_eq!(Digest::of(&[]), 0);
    }

    #[test]
    fn zeros_and_exchanged_units_equal_the_whole() {
        for units in [0u32, 1, 2, 3, 7, 64, 255] {
            let mut digest = Digest::default();
            digest.push(5);
            let mut pushed = digest;
            digest.push_zeros(units);
            (0..units).for_each(|_| pushed.push(*ZERO_UNIT_CRC));
            assert_eq!(digest.finish(), pushed.finish(), "{units} units");
        }
        let mut content: Vec<u8> = (0..9 * DIGEST_UNIT).map(|i| (i * 7 % 251) as u8).collect();
        let unit =
            |content: &[u8], i: usize| crc32c::crc32c(&content[i * DIGEST_UNIT..(i + 1) * DIGEST_UNIT]);
        for at in [0usize, 4, 8] {
            let mut digest = Digest::resume(Digest::of(&content));
            let old = unit(&content, at);
            content[at * DIGEST_UNIT + 9] ^= 0x31;
            digest.replace(8 - at as u32, old, unit(&content, at));
            assert_eq!(digest.finish(), Digest::of(&content), "unit {at}");
        }
    }

    #[test]
    fn a_bound_checksum_is_that_of_seal_and_unit() {
        let unit = vec![9u8; DIGEST_UNIT];
        let crc = crc32c::crc32c(&unit);
        let bound = bind(b"where", crc);
        assert_eq!(bound, crc32c::crc32c(&[b"where".as_slice(), &unit].concat()));
        assert_eq!(unbind(b"where", bound), crc);
        assert_ne!(bind(b"there", crc), bound);
    }
}
