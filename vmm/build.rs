//! Compiles the jail's lists of system calls to filters (seccomp(2)), so that no start has to.

#[path = "src/jail/calls.rs"]
#[allow(dead_code, reason = "only what filters are made of is used here")]
mod calls;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

use calls::{Kind, Only};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/jail/calls.rs");
    let mut source = String::new();
    for (kind, _) in Kind::ALL {
        let program = compile(kind)?;
        let name = format!("{kind:?}").to_uppercase();
        writeln!(source, "static {name}: [sock_filter; {}] = [", program.len())?;
        for seccompiler::sock_filter { code, jt, jf, k } in program {
            writeln!(source, "    sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},")?;
        }
        writeln!(source, "];")?;
    }
    let out = std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?;
    Ok(std::fs::write(PathBuf::from(out).join("filters.rs"), source)?)
}

fn compile(kind: Kind) -> Result<BpfProgram, Box<dyn std::error::Error>> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in kind.calls() {
        let condition = |index, op, value: u32| {
            let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value.into())?;
            SeccompRule::new(vec![condition])
        };
        let any_of = match call.only {
            Only::Any => Vec::new(),
            Only::OneOf(index, values) => values
                .iter()
                .map(|value| condition(index, SeccompCmpOp::Eq, value.value))
                .collect::<Result<Vec<_>, _>>()?,
            Only::Without(index, mask) => {
                vec![condition(index, SeccompCmpOp::MaskedEq(mask.into()), 0)?]
            }
        };
        if rules.insert(call.number, any_of).is_some() {
            return Err(format!("{} is twice in the list of {kind:?}", call.name()).into());
        }
    }
    let kill = SeccompAction::KillProcess;
    Ok(SeccompFilter::new(rules, kill, SeccompAction::Allow, TargetArch::x86_64)?.try_into()?)
}
