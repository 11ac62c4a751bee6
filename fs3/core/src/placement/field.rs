//! Finite fields: the arithmetic that block designs are made of.

/// GF(pᵐ). Elements are numbers below pᵐ whose digits to base p are the coefficients of a
/// polynomial; the powers of a primitive element are tabulated.
pub(super) struct Field {
    p: usize,
    /// `powers[i]` is the i-th power of the primitive element; as many as the field has non-zero
    /// elements.
    powers: Vec<usize>,
}

/// `(p, m)` with `pᵐ = n` and p prime, if there is such a pair.
pub(super) fn prime_power(n: usize) -> Option<(usize, usize)> {
    let p = (2..=n).find(|d| n.is_multiple_of(*d))?;
    let (mut rest, mut m) = (n, 0);
    while rest.is_multiple_of(p) {
        rest /= p;
        m += 1;
    }
    (rest == 1).then_some((p, m))
}

impl Field {
    /// The field of `p.pow(m)` elements.
    pub(super) fn new(p: usize, m: usize) -> Self {
        let size = p.pow(m as u32);
        // x^m is a combination of lower powers; the coefficients for which x runs through all
        // non-zero elements are found by trying. About one in log(size) does.
        let powers = (1..size)
            .find_map(|coefficients| powers_of_x(p, m, coefficients))
            .expect("every finite field has a primitive element");
        Self { p, powers }
    }

    /// Non-zero elements.
    pub(super) fn units(&self) -> usize {
        self.powers.len()
    }

    /// The i-th power of the primitive element.
    pub(super) fn power(&self, i: usize) -> usize {
        self.powers[i % self.powers.len()]
    }

    pub(super) fn add(&self, a: usize, b: usize) -> usize {
        add(self.p, a, b)
    }
}

/// Digits to base `p`, added without carry.
pub(super) fn add(p: usize, mut a: usize, mut b: usize) -> usize {
    let (mut sum, mut place) = (0, 1);
    while a > 0 || b > 0 {
        sum += (a % p + b % p) % p * place;
        (a, b, place) = (a / p, b / p, place * p);
    }
    sum
}

fn powers_of_x(p: usize, m: usize, coefficients: usize) -> Option<Vec<usize>> {
    let top = p.pow(m as u32 - 1);
    let scaled = |by: usize| -> usize {
        let (mut c, mut place, mut out) = (coefficients, 1, 0);
        while c > 0 {
            out += c % p * by % p * place;
            (c, place) = (c / p, place * p);
        }
        out
    };
    let multiples: Vec<usize> = (0..p).map(scaled).collect();
    let times_x = |e: usize| add(p, e % top * p, multiples[e / top]);
    let mut powers = vec![1];
    loop {
        let next = times_x(powers[powers.len() - 1]);
        match next {
            1 => return (powers.len() == top * p - 1).then_some(powers),
            // A product of non-zero elements is zero only where there is no field.
            0 => return None,
            _ if powers.len() >= top * p => return None,
            _ => powers.push(next),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_has_all_its_elements_as_powers() {
        for n in 2..=64 {
            let Some((p, m)) = prime_power(n) else { continue };
            assert_eq!(p.pow(m as u32), n);
            let mut elements = Field::new(p, m).powers;
            elements.sort_unstable();
            assert_eq!(elements, (1..n).collect::<Vec<_>>(), "GF({n})");
        }
        assert_eq!(prime_power(1), None);
        assert_eq!(prime_power(12), None);
        assert_eq!(prime_power(49), Some((7, 2)));
    }
}
