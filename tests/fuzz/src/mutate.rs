//! New inputs from old ones. Everything comes from a seed, so that a test does the same each time.

/// A generator of numbers that look random (SplitMix64).
pub struct Random(pub u64);

/// Values at which arithmetic and comparisons turn.
const INTERESTING: [u64; 14] = [
    0,
    1,
    2,
    7,
    8,
    15,
    16,
    0x7f,
    0xff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_ffff,
];

impl Random {
    /// The next one.
    #[allow(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `bound`, or 0.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

/// An input made from one of `inputs` (or from nothing), no longer than `longest`.
pub fn mutate(random: &mut Random, inputs: &[Vec<u8>], longest: usize) -> Vec<u8> {
    let pick = |random: &mut Random| inputs.get(random.below(inputs.len())).cloned().unwrap_or_default();
    let mut input = pick(random);
    for _ in 0..1 << random.below(5) {
        let at = random.below(input.len() + 1);
        let n = 1 + random.below(16);
        match random.below(8) {
            0 => flip(&mut input, at, 1 << random.below(8)),
            1 => flip(&mut input, at, random.next() as u8),
            2 => drop(input.drain(at..(at + n).min(input.len()))),
            3 => insert(&mut input, at, &(0..n).map(|_| random.next() as u8).collect::<Vec<_>>()),
            4 => {
                let value = INTERESTING[random.below(INTERESTING.len())].to_le_bytes();
                let width = 1 << random.below(4);
                let end = (at + width).min(input.len());
                input.splice(at..end, value[..width].iter().copied());
            }
            5 => {
                let end = (at + 4 * n).min(input.len());
                let piece = input[at..end].to_vec();
                let to = random.below(input.len() + 1);
                insert(&mut input, to, &piece);
            }
            6 => {
                let other = pick(random);
                let from = random.below(other.len() + 1);
                let end = (from + 1 + random.below(256)).min(other.len());
                insert(&mut input, at, &other[from..end]);
            }
            _ => {
                let other = pick(random);
                input.truncate(at);
                input.extend(&other[random.below(other.len() + 1)..]);
            }
        }
    }
    input.truncate(longest);
    input
}

fn flip(input: &mut [u8], at: usize, bits: u8) {
    if let Some(byte) = input.get_mut(at) {
        *byte ^= bits;
    }
}

fn insert(input: &mut Vec<u8>, at: usize, piece: &[u8]) {
    input.splice(at..at, piece.iter().copied());
}
