//! Filters (classic BPF) made from profiles.
//!
//! crun up to 1.8 has libseccomp compile the profile at each start of a container, which costs more than all the rest of the
//! start; it also takes a finished filter. What we compile answers exactly as libseccomp's filter does; where we cannot be sure of
//! that, there is no filter and the runtime compiles. tests/host compares the two call by call. One difference is wanted: a
//! call that the host's libseccomp is too old to know gets what the profile says, not the default.
//!
//! Of x86_64 alone, whose tables are known to agree. seccompiler would do for one architecture, but programs of 32 bits make calls on the same kernel, and the profile is about
//! theirs too: this filter looks at the architecture first, then finds the number by bisection.

use std::collections::BTreeMap;

use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompOperator as Operator};

use super::numbers::{number, Abi, IPC_CALLS, SOCKET_CALLS, X32_BIT};

/// BPF_MAXINSNS of linux/bpf_common.h
const MOST_INSTRUCTIONS: usize = 4096;
/// What a call of an architecture that the profile does not list gets: libseccomp's default.
const BAD_ARCH: u32 = 0; // SECCOMP_RET_KILL_THREAD
const EPERM: u32 = 1;

/// Offsets in struct seccomp_data (linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

/// Opcodes of linux/bpf_common.h, as combined.
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_EQUAL: u16 = 0x35;

/// The filter of a profile, as an array of struct sock_filter, for a machine of this architecture (name of
/// `std::env::consts::ARCH`). None: let the runtime make it.
pub fn compile(profile: &LinuxSeccomp, native: &str) -> Option<Vec<u8>> {
    // Speaks of how to load it, of somebody who listens, or of architectures whose tables we do not have.
    if profile.flags().as_ref().is_some_and(|flags| !flags.is_empty()) || profile.listener_path().is_some() {
        return None;
    }
    let default = answer(profile.default_action(), profile.default_errno_ret())?;
    if native != "x86_64" {
        return None;
    }
    let mut abis = vec![Abi::X86_64];
    for arch in profile.architectures().iter().flatten() {
        let abi = match arch {
            Arch::ScmpArchX86_64 => Abi::X86_64,
            Arch::ScmpArchX32 => Abi::X32,
            Arch::ScmpArchX86 => Abi::X86,
            _ => return None,
        };
        if !abis.contains(&abi) {
            abis.push(abi);
        }
    }
    let mut calls = rules(profile, Abi::X86_64, default)?;
    // They come with the same architecture.
    let amd64 = match abis.contains(&Abi::X32) {
        true => {
            calls.extend(rules(profile, Abi::X32, default)?);
            section(calls, false, default)
        }
        false => {
            let mut segments = segments(calls, false, default);
            cut_x32(&mut segments);
            bisect(&segments, default)
        }
    };
    let x86 = abis.contains(&Abi::X86).then(|| rules(profile, Abi::X86, default).map(|calls| section(calls, true, default)));
    let x86 = match x86 {
        Some(section) => Some(section?),
        None => None,
    };
    // AUDIT_ARCH_* of linux/audit.h
    let sections = [(0xc000_003e, Some(amd64)), (0x4000_0003, x86)];
    let mut program = vec![Instruction::load(ARCH)];
    for (arch, section) in sections.into_iter().filter_map(|(arch, section)| Some((arch, section?))) {
        program.push(Instruction::new(JUMP_EQUAL, 1, 0, arch));
        program.push(Instruction::new(JUMP, 0, 0, section.len() as u32 + 1));
        program.push(Instruction::load(NUMBER));
        program.extend(section);
    }
    program.push(Instruction::answer(BAD_ARCH));
    (program.len() <= MOST_INSTRUCTIONS).then(|| program.into_iter().flat_map(Instruction::bytes).collect())
}

/// SECCOMP_RET_* of an action; None for one that needs a listener.
fn answer(action: Action, errno: Option<u32>) -> Option<u32> {
    let data = errno.unwrap_or(EPERM) & 0xffff;
    Some(match action {
        Action::ScmpActKill | Action::ScmpActKillThread => 0,
        Action::ScmpActKillProcess => 0x8000_0000,
        Action::ScmpActTrap => 0x0003_0000,
        Action::ScmpActErrno => 0x0005_0000 | data,
        Action::ScmpActTrace => 0x7ff0_0000 | data,
        Action::ScmpActLog => 0x7ffc_0000,
        Action::ScmpActAllow => 0x7fff_0000,
        Action::ScmpActNotify => return None,
    })
}

/// What becomes of one call.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Rule {
    Always(u32),
    /// `action` if all conditions of one of the lists hold, else the default.
    If {
        action: u32,
        any: Vec<Vec<LinuxSeccompArg>>,
    },
}

/// The rules of one calling convention. As libseccomp has it, one without conditions wins over those with, and the first over later ones.
/// None where conditions with different actions meet: whose order counts then is not for us to guess.
fn rules(profile: &LinuxSeccomp, abi: Abi, default: u32) -> Option<BTreeMap<u32, Rule>> {
    let narrow = matches!(abi, Abi::X86 | Abi::X32);
    let mut rules: BTreeMap<u32, Rule> = BTreeMap::new();
    let (mut by_socketcall, mut by_ipc) = (false, false);
    for entry in profile.syscalls().iter().flatten() {
        let action = answer(entry.action(), entry.errno_ret())?;
        // Runtimes leave these out.
        if action == default {
            continue;
        }
        let conditions = entry.args().as_deref().unwrap_or_default();
        if conditions.len() > 6 || conditions.iter().any(|condition| !is_plain(condition, narrow)) {
            return None;
        }
        let any = alternatives(conditions);
        for name in entry.names() {
            by_socketcall |= SOCKET_CALLS.contains(&name.as_str());
            by_ipc |= IPC_CALLS.contains(&name.as_str());
            let Some(number) = number(abi, name) else { continue };
            match (rules.get_mut(&number), any.is_empty()) {
                (Some(Rule::Always(_)), _) => {}
                (_, true) => drop(rules.insert(number, Rule::Always(action))),
                (Some(Rule::If { action: other, .. }), false) if *other != action => return None,
                (Some(Rule::If { any: present, .. }), false) => present.extend(any.iter().cloned()),
                (None, false) => drop(rules.insert(number, Rule::If { action, any: any.clone() })),
            }
        }
    }
    // libseccomp adds rules for the call through which these can be made too. They change nothing if that has one without conditions.
    let settled = |name: &str| matches!(number(abi, name).and_then(|number| rules.get(&number)), Some(Rule::Always(_)));
    if abi == Abi::X86 && ((by_socketcall && !settled("socketcall")) || (by_ipc && !settled("ipc"))) {
        return None;
    }
    Some(rules)
}

fn is_plain(condition: &LinuxSeccompArg, narrow: bool) -> bool {
    let (value, second) = (condition.value(), condition.value_two().unwrap_or(0));
    let masked = condition.op() == Operator::ScmpCmpMaskedEq;
    let fits = |number: u64| !narrow || number <= u64::from(u32::MAX);
    condition.index() < 6 && fits(value) && (!masked || (fits(second) && second & !value == 0))
}

/// Runtimes take several conditions on one argument as alternatives, and conditions on different ones together.
fn alternatives(conditions: &[LinuxSeccompArg]) -> Vec<Vec<LinuxSeccompArg>> {
    let doubled = conditions.iter().enumerate().any(|(n, condition)| conditions[..n].iter().any(|c| c.index() == condition.index()));
    match (conditions.is_empty(), doubled) {
        (true, _) => Vec::new(),
        (false, true) => conditions.iter().map(|condition| vec![*condition]).collect(),
        (false, false) => vec![conditions.to_vec()],
    }
}

/// What calls from `first` up to the next segment's first get: code that ends in an answer, equal ones merged.
struct Segment {
    first: u32,
    code: Vec<Instruction>,
}

fn segments(rules: BTreeMap<u32, Rule>, narrow: bool, default: u32) -> Vec<Segment> {
    let mut list: Vec<Segment> = Vec::new();
    let mut push = |first: u32, code: Vec<Instruction>| {
        if list.last().is_none_or(|last| last.code != code) {
            list.push(Segment { first, code });
        }
    };
    let mut next = 0;
    for (number, rule) in rules {
        if number > next {
            push(next, vec![Instruction::answer(default)]);
        }
        // Registers of x32 have 64 bits, its arguments 32.
        push(number, code(&rule, narrow || number >= X32_BIT, default));
        next = number + 1;
    }
    push(next, vec![Instruction::answer(default)]);
    list
}

/// A profile about x86_64 without x32: its calls are of an architecture that is not listed. -1 is no such call: a tracer's way to
/// have one skipped.
fn cut_x32(segments: &mut Vec<Segment>) {
    let last = segments.last().map(|last| last.code.clone()).unwrap_or_default();
    segments.retain(|segment| segment.first < X32_BIT);
    segments.push(Segment { first: X32_BIT, code: vec![Instruction::answer(BAD_ARCH)] });
    segments.push(Segment { first: u32::MAX, code: last });
}

fn section(rules: BTreeMap<u32, Rule>, narrow: bool, default: u32) -> Vec<Instruction> {
    bisect(&segments(rules, narrow, default), default)
}

/// The number is in the accumulator.
fn bisect(segments: &[Segment], default: u32) -> Vec<Instruction> {
    match segments {
        [] => vec![Instruction::answer(default)],
        [one] => one.code.clone(),
        _ => {
            let (low, high) = segments.split_at(segments.len() / 2);
            let (below, above) = (bisect(low, default), bisect(high, default));
            let first = high[0].first;
            let mut code = match u8::try_from(below.len()) {
                Ok(length) => vec![Instruction::new(JUMP_GREATER_EQUAL, length, 0, first)],
                Err(_) => {
                    vec![Instruction::new(JUMP_GREATER_EQUAL, 0, 1, first), Instruction::new(JUMP, 0, 0, below.len() as u32)]
                }
            };
            code.extend(below);
            code.extend(above);
            code
        }
    }
}

fn code(rule: &Rule, narrow: bool, default: u32) -> Vec<Instruction> {
    match rule {
        Rule::Always(action) => vec![Instruction::answer(*action)],
        Rule::If { action, any } => {
            let mut all = Vec::new();
            for conditions in any {
                // Backwards: each condition must know how far it is to the end of this alternative.
                let mut tail = vec![Instruction::answer(*action)];
                for condition in conditions.iter().rev() {
                    let mut test = test(condition, narrow, tail.len());
                    test.extend(tail);
                    tail = test;
                }
                all.extend(tail);
            }
            all.push(Instruction::answer(default));
            all
        }
    }
}

/// Goes on behind its end if the condition holds, else `rest` instructions further.
fn test(condition: &LinuxSeccompArg, narrow: bool, rest: usize) -> Vec<Instruction> {
    use Operator::*;
    let (value, second) = (condition.value(), condition.value_two().unwrap_or(0));
    let halves = |number: u64| ((number >> 32) as u32, number as u32);
    let at = ARGS + 8 * condition.index() as u32;
    let (low, high) = (Instruction::load(at), Instruction::load(at + 4));
    let fail = rest as u8; // six conditions of six instructions at most
    let step = Instruction::new;

    let ((value_high, value_low), (second_high, second_low)) = (halves(value), halves(second));
    let mut code = match (narrow, condition.op()) {
        (true, _) => Vec::new(),
        (false, ScmpCmpMaskedEq) => vec![high, step(AND, 0, 0, value_high), step(JUMP_EQUAL, 0, fail + 3, second_high)],
        (false, ScmpCmpEq) => vec![high, step(JUMP_EQUAL, 0, fail + 2, value_high)],
        (false, ScmpCmpNe) => vec![high, step(JUMP_EQUAL, 0, 2, value_high)],
        (false, ScmpCmpGt | ScmpCmpGe) => {
            vec![high, step(JUMP_GREATER, 3, 0, value_high), step(JUMP_EQUAL, 0, fail + 2, value_high)]
        }
        (false, ScmpCmpLt | ScmpCmpLe) => {
            vec![high, step(JUMP_GREATER, fail + 3, 0, value_high), step(JUMP_EQUAL, 0, 2, value_high)]
        }
    };
    code.push(low);
    match condition.op() {
        ScmpCmpMaskedEq => code.extend([step(AND, 0, 0, value_low), step(JUMP_EQUAL, 0, fail, second_low)]),
        ScmpCmpEq => code.push(step(JUMP_EQUAL, 0, fail, value_low)),
        ScmpCmpNe => code.push(step(JUMP_EQUAL, fail, 0, value_low)),
        ScmpCmpGt => code.push(step(JUMP_GREATER, 0, fail, value_low)),
        ScmpCmpGe => code.push(step(JUMP_GREATER_EQUAL, 0, fail, value_low)),
        ScmpCmpLt => code.push(step(JUMP_GREATER_EQUAL, fail, 0, value_low)),
        ScmpCmpLe => code.push(step(JUMP_GREATER, fail, 0, value_low)),
    }
    code
}

/// struct sock_filter
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u16,
    if_true: u8,
    if_false: u8,
    k: u32,
}

impl Instruction {
    fn new(code: u16, if_true: u8, if_false: u8, k: u32) -> Instruction {
        Instruction { code, if_true, if_false, k }
    }

    fn load(offset: u32) -> Instruction {
        Instruction::new(LOAD, 0, 0, offset)
    }

    fn answer(action: u32) -> Instruction {
        Instruction::new(RETURN, 0, 0, action)
    }

    /// Little-endian, as the architectures that we know are.
    fn bytes(self) -> [u8; 8] {
        let (code, k) = (self.code.to_le_bytes(), self.k.to_le_bytes());
        [code[0], code[1], self.if_true, self.if_false, k[0], k[1], k[2], k[3]]
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{Capabilities, Capability, LinuxSeccompFilterFlag};

    use super::super::interpreter::{run, Call};
    use super::super::{runtime_default, Conditions, Profile};
    use super::*;

    const X86_64: u32 = 0xc000_003e;
    const X86: u32 = 0x4000_0003;
    const ALLOW: u32 = 0x7fff_0000;
    const DENY: u32 = 0x0005_0001;
    const NO_CALL: u32 = 0x0005_0026;

    fn default(bounding: &[Capability]) -> LinuxSeccomp {
        let bounding: Capabilities = bounding.iter().copied().collect();
        runtime_default(&Conditions { bounding: &bounding, arch: "x86_64", kernel: (6, 1) })
    }

    fn file(text: &str) -> LinuxSeccomp {
        let conditions = Conditions { bounding: &Capabilities::new(), arch: "x86_64", kernel: (6, 1) };
        Profile::parse(text.as_bytes()).unwrap().resolve(&conditions).unwrap().0
    }

    /// A profile of these entries, everything else EPERM.
    fn entries(text: &str) -> LinuxSeccomp {
        file(&format!(
            r#"{{"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "syscalls": [{text}]}}"#
        ))
    }

    fn ask(program: &[u8], arch: u32, number: u32, args: &[u64]) -> u32 {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        run(program, &Call { arch, number, args: all })
    }

    #[test]
    fn default_profile() {
        let program = compile(&default(&[]), "x86_64").unwrap();
        assert!(program.len() < 8 * 1024, "{} bytes", program.len());
        let amd64 = |number: u32, args: &[u64]| ask(&program, X86_64, number, args);
        assert_eq!([amd64(0, &[]), amd64(39, &[]), amd64(462, &[])], [ALLOW; 3], "read, getpid, mseal");
        assert_eq!([amd64(165, &[]), amd64(425, &[]), amd64(9999, &[])], [DENY; 3], "mount, io_uring_setup, none");
        assert_eq!(amd64(435, &[]), NO_CALL, "clone3");
        assert_eq!([amd64(56, &[0x11]), amd64(56, &[0x1000_0011])], [ALLOW, DENY], "clone with CLONE_NEWUSER");
        assert_eq!([amd64(41, &[1]), amd64(41, &[38]), amd64(41, &[1 << 32])], [ALLOW, DENY, DENY], "socket");
        assert_eq!([amd64(135, &[0xffff_ffff]), amd64(135, &[u64::MAX])], [ALLOW, DENY], "personality");
        // The same of 32 bits, with other numbers, and of x32.
        assert_eq!([ask(&program, X86, 3, &[]), ask(&program, X86, 21, &[]), ask(&program, X86, 435, &[])], [ALLOW, DENY, NO_CALL]);
        assert_eq!([ask(&program, X86_64, 0x4000_0000, &[]), ask(&program, X86_64, 0x4000_00a5, &[])], [ALLOW, DENY]);
        assert_eq!(ask(&program, 0xc000_00b7, 63, &[]), BAD_ARCH, "read of aarch64");
        let admin = compile(&default(&[Capability::SysAdmin]), "x86_64").unwrap();
        assert_eq!([ask(&admin, X86_64, 165, &[]), ask(&admin, X86_64, 435, &[])], [ALLOW; 2]);
    }

    #[test]
    fn comparisons_are_of_64_bits_or_32() {
        const V: u64 = 0x2_0000_0005;
        let around = [0, 4, 5, 6, 0x1_0000_0005, 0x2_0000_0004, V, 0x2_0000_0006, 0x3_0000_0000, u64::MAX];
        type Holds = fn(u64) -> bool;
        let operators: [(&str, Holds); 6] =
            [("NE", |a| a != V), ("LT", |a| a < V), ("LE", |a| a <= V), ("EQ", |a| a == V), ("GE", |a| a >= V), ("GT", |a| a > V)];
        let only_wide = |op: &str, value: u64, second: u64| {
            let rule = format!(
                r#"{{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{{"index": 2, "value": {value}, "valueTwo": {second}, "op": "SCMP_CMP_{op}"}}]}}"#
            );
            format!(r#"{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{rule}]}}"#)
        };
        for (op, holds) in operators {
            let program = compile(&file(&only_wide(op, V, 0)), "x86_64").unwrap();
            for value in around {
                assert_eq!(ask(&program, X86_64, 0, &[7, 7, value]) == ALLOW, holds(value), "{value:#x} {op}");
            }
        }
        let program = compile(&file(&only_wide("MASKED_EQ", 0x3_0000_000f, 0x2_0000_0005)), "x86_64").unwrap();
        for value in around {
            assert_eq!(ask(&program, X86_64, 0, &[0, 0, value]) == ALLOW, value & 0x3_0000_000f == V, "{value:#x} masked");
        }
        // What 32 bits cannot hold, and a mask that can never match, are left to the runtime.
        let narrow = r#"{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 4294967296, "op": "SCMP_CMP_EQ"}]}"#;
        assert_eq!(compile(&entries(narrow), "x86_64"), None);
        assert_eq!(compile(&file(&only_wide("MASKED_EQ", 0xf0, 0x0f)), "x86_64"), None);
    }

    #[test]
    fn conditions_on_one_argument_are_alternatives_and_on_several_are_not() {
        let arg = |index: usize, value: u64| format!(r#"{{"index": {index}, "value": {value}, "op": "SCMP_CMP_EQ"}}"#);
        let both = format!(r#"{{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{}, {}]}}"#, arg(0, 1), arg(1, 2));
        let either = format!(r#"{{"names": ["write"], "action": "SCMP_ACT_ALLOW", "args": [{}, {}]}}"#, arg(0, 1), arg(0, 2));
        let program = compile(&entries(&format!("{both}, {either}")), "x86_64").unwrap();
        let allowed = |number: u32, args: &[u64]| ask(&program, X86_64, number, args) == ALLOW;
        assert_eq!([allowed(0, &[1, 2]), allowed(0, &[1, 1]), allowed(0, &[2, 2])], [true, false, false]);
        assert_eq!([allowed(1, &[1]), allowed(1, &[2]), allowed(1, &[3])], [true, true, false]);
    }

    #[test]
    fn first_rule_without_conditions_wins() {
        let rule = |action: &str, args: &str| format!(r#"{{"names": ["read"], "action": "SCMP_ACT_{action}", "args": [{args}]}}"#);
        let condition = r#"{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}"#;
        let of = |rules: &[String]| compile(&entries(&rules.join(",")), "x86_64").map(|program| ask(&program, X86_64, 0, &[1]));
        assert_eq!(of(&[rule("LOG", ""), rule("ALLOW", "")]), Some(0x7ffc_0000));
        assert_eq!(of(&[rule("LOG", condition), rule("ALLOW", "")]), Some(ALLOW));
        assert_eq!(of(&[rule("ALLOW", ""), rule("LOG", condition)]), Some(ALLOW));
        // One with the default action is as good as not there.
        assert_eq!(of(&[rule("ERRNO", ""), rule("ALLOW", "")]), Some(ALLOW));
        assert_eq!(of(&[rule("LOG", condition), rule("ALLOW", condition)]), None, "whose turn it is only libseccomp knows");
    }

    #[test]
    fn what_only_the_runtime_can_make() {
        let mut flags = default(&[]);
        flags.set_flags(Some(vec![LinuxSeccompFilterFlag::SeccompFilterFlagLog]));
        assert_eq!(compile(&flags, "x86_64"), None);
        let notify =
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/s", "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]}"#;
        assert_eq!(compile(&file(notify), "x86_64"), None);
        for arch in ["aarch64", "s390x", "x86"] {
            assert_eq!(compile(&default(&[]), arch), None, "{arch}");
        }
        let mut mips = default(&[]);
        mips.set_architectures(Some(vec![Arch::ScmpArchMips]));
        assert_eq!(compile(&mips, "x86_64"), None);
        // Sockets of 32 bits come through socketcall(2) too.
        let socket = r#"{"names": ["socket"], "action": "SCMP_ACT_ALLOW"}"#;
        assert_eq!(compile(&entries(socket), "x86_64"), None);
        let both = format!(r#"{socket}, {{"names": ["socketcall"], "action": "SCMP_ACT_ALLOW"}}"#);
        assert!(compile(&entries(&both), "x86_64").is_some());
        assert_eq!(compile(&entries(r#"{"names": ["shmat"], "action": "SCMP_ACT_ALLOW"}"#), "x86_64"), None);
    }

    #[test]
    fn unlisted_x32_is_another_architecture() {
        let program = compile(&entries(r#"{"names": ["read"], "action": "SCMP_ACT_ALLOW"}"#), "x86_64").unwrap();
        let on = |number: u32| ask(&program, X86_64, number, &[]);
        assert_eq!([on(0), on(0x3fff_ffff), on(X32_BIT), on(0xffff_fffe), on(u32::MAX)], [ALLOW, DENY, BAD_ARCH, BAD_ARCH, DENY]);
    }

    proptest::proptest! {
        /// Bisection finds what a map finds.
        #[test]
        fn each_call_gets_its_rule(numbers in proptest::collection::btree_map(0u32..500, 0u32..4, 0..120), asked in 0u32..600) {
            let rules: BTreeMap<u32, Rule> = numbers.iter().map(|(number, action)| (*number, Rule::Always(*action))).collect();
            let code = section(rules, false, 9);
            let program: Vec<u8> = [Instruction::load(NUMBER)].into_iter().chain(code).flat_map(Instruction::bytes).collect();
            proptest::prop_assert_eq!(ask(&program, 0, asked, &[]), numbers.get(&asked).copied().unwrap_or(9));
        }
    }
}
