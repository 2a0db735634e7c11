//! Generates the messages of `src/shim/pod_config.proto`, with a parser in Rust: no `protoc` needed.

fn main() {
    println!("cargo:rerun-if-changed=src/shim/pod_config.proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .include("src/shim")
        .input("src/shim/pod_config.proto")
        .customize(protobuf_codegen::Customize::default().gen_mod_rs(false))
        .cargo_out_dir("shim")
        .run_from_script();
    // The generator's own mod.rs begins with an inner attribute, which include!() does not allow.
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo names it")).join("shim");
    std::fs::write(out.join("generated.rs"), "pub mod pod_config;\n").expect("write the list of modules");
}
