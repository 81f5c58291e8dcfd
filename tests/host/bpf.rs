//! Runs a seccomp filter as the kernel does: the part of classic BPF that seccomp(2) takes. The tests of the library use it too.

/// What a filter is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// AUDIT_ARCH of linux/audit.h.
    pub arch: u32,
    pub number: u32,
    pub args: [u64; 6],
}

impl Call {
    /// A word of struct seccomp_data (linux/seccomp.h), little-endian.
    fn word(&self, offset: u32) -> u32 {
        match offset {
            0 => self.number,
            4 => self.arch,
            8 | 12 => 0, // the instruction pointer
            16..=60 if offset % 4 == 0 => (self.args[(offset as usize - 16) / 8] >> (8 * (offset % 8))) as u32,
            _ => panic!("load from {offset}"),
        }
    }
}

/// The answer (SECCOMP_RET_*) of a filter of struct sock_filter (linux/filter.h). Panics on what the kernel would refuse.
pub fn run(program: &[u8], call: &Call) -> u32 {
    assert!(!program.is_empty() && program.len() % 8 == 0 && program.len() / 8 <= 4096, "{} bytes", program.len());
    let (mut at, mut accumulator, mut scratch) = (0, 0u32, [0u32; 16]);
    loop {
        let instruction: [u8; 8] = program[at * 8..at * 8 + 8].try_into().unwrap();
        let code = u16::from_le_bytes([instruction[0], instruction[1]]);
        let (if_true, if_false) = (usize::from(instruction[2]), usize::from(instruction[3]));
        let k = u32::from_le_bytes([instruction[4], instruction[5], instruction[6], instruction[7]]);
        at += 1;
        let mut jump = |condition: bool| at += if condition { if_true } else { if_false };
        match code {
            0x20 => accumulator = call.word(k),
            0x60 => accumulator = scratch[k as usize],
            0x02 => scratch[k as usize] = accumulator,
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => jump(accumulator == k),
            0x25 => jump(accumulator > k),
            0x35 => jump(accumulator >= k),
            0x45 => jump(accumulator & k != 0),
            0x06 => return k,
            _ => panic!("instruction {code:#x}"),
        }
    }
}
