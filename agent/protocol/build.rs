//! Generates the messages and the ttrpc service from `agent.proto`, with a parser in Rust: no `protoc` needed.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=agent.proto");
    let out_dir = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out_dir)
        .input("agent.proto")
        .include(".")
        .rust_protobuf()
        .customize(Customize { async_all: true, ..Default::default() })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The generators' own mod.rs begins with an inner attribute, which include!() does not allow.
    std::fs::write(out_dir.join("generated.rs"), "pub mod agent;\npub mod agent_ttrpc;\n")?;
    Ok(())
}
