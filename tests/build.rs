//! Generates the messages of `src/cri/cri.proto`, with a parser in Rust: no `protoc` needed.

fn main() {
    println!("cargo:rerun-if-changed=src/cri/cri.proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .include("src/cri")
        .input("src/cri/cri.proto")
        .customize(protobuf_codegen::Customize::default().gen_mod_rs(false))
        .cargo_out_dir("cri")
        .run_from_script();
    // The generator's own mod.rs begins with an inner attribute, which include!() does not allow.
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo names it")).join("cri");
    std::fs::write(out.join("generated.rs"), "pub mod cri;\n").expect("write the list of modules");
}
