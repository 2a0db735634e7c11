//! `stockade-lab`: the lab on the command line.

use std::process::ExitCode;
use std::time::Duration;
use stockade_tests::lab::{self, Clock, Lab};

const USAGE: &str = "\
stockade-lab image                       make the lab's image if it is not there, and say where it is
stockade-lab shell [OPTIONS]             an interactive shell in the lab
stockade-lab run [OPTIONS] -- CMD...     run a command in the lab; its exit code is returned
stockade-lab kvm                         tell whether this machine has usable KVM (exit code 0) or not (1)

  --virtual-clock      one CPU, 2 ns an instruction: times are instruction counts
  --smp N --mem MIB    CPUs and memory of the host (default: 2, or 1 on the virtual clock, and 4096)
  --timeout SECONDS    limit for boot and command (default: 1800; shell: a day)
  --payload DIR        put DIR's content under /payload; bin/ there is on PATH
  --add FILE=PATH      put FILE at /payload/PATH
  --out DIR            put what the command leaves in /out there
  --env NAME=VALUE     set a variable for the command
  --console FILE       keep the host's console
  --systemd            systemd runs the host
  --append WORDS       more words for the host's kernel command line
  -i                   standard input goes to the command
  -t                   with -i: on a terminal of its own";

fn main() -> ExitCode {
    lab::init_if_booted();
    match parse_and_run() {
        Ok(code) => ExitCode::from(code as u8),
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn parse_and_run() -> Result<i32, String> {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next().ok_or(USAGE)?;
    let mut lab = Lab::default();
    if command == "shell" {
        (lab.input, lab.terminal, lab.limit) = (true, true, Duration::from_secs(24 * 3600));
    }
    let mut argv: Vec<String> = Vec::new();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        let number =
            |text: String| text.parse::<u32>().map_err(|error| format!("{argument} {text}: {error}"));
        let pair = |text: String| {
            let split = text.split_once('=').map(|(a, b)| (a.to_string(), b.to_string()));
            split.ok_or(format!("{argument} {text}: no '=' in it"))
        };
        match argument.as_str() {
            "--virtual-clock" => lab.clock = Clock::Virtual,
            "--smp" => lab.cpus = Some(number(value()?)?),
            "--mem" => lab.memory_mib = number(value()?)?,
            "--timeout" => lab.limit = Duration::from_secs(number(value()?)?.into()),
            "--payload" => drop(lab.payload.add(value()?, "")),
            "--add" => {
                let (host, inside) = pair(value()?)?;
                lab.payload.add(host, inside);
            }
            "--out" => lab.out = Some(value()?.into()),
            "--env" => lab.env.push(pair(value()?)?),
            "--console" => lab.console_log = Some(value()?.into()),
            "--systemd" => lab.systemd = true,
            "--append" => lab.kernel_arguments = value()?,
            "-i" => lab.input = true,
            "-t" => (lab.input, lab.terminal) = (true, true),
            "--" => argv.extend(arguments.by_ref()),
            _ => return Err(format!("unknown argument {argument}\n{USAGE}")),
        }
    }
    match command.as_str() {
        "image" => {
            let image = lab::ensure_image().map_err(|error| error.to_string())?;
            println!("{}", image.folder.display());
            Ok(0)
        }
        "kvm" => Ok(match lab::usable_kvm() {
            Ok(()) => 0,
            Err(why) => {
                println!("{why}");
                1
            }
        }),
        "shell" => {
            if argv.is_empty() {
                argv = vec!["/bin/bash".into(), "-l".into()];
            }
            lab.run(&argv).map_err(|error| error.to_string())
        }
        "run" if !argv.is_empty() => lab.run(&argv).map_err(|error| error.to_string()),
        "run" => Err(format!("no command after --\n{USAGE}")),
        _ => Err(format!("unknown command {command}\n{USAGE}")),
    }
}
