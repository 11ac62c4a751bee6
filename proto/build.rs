//! Compiles the contracts with protoc (Debian package `protobuf-compiler`).

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["fs3_mgmtd", "fs3_meta", "fs3_storage", "scheduler"]
        .map(|name| format!("proto/firefly/{name}.proto"));
    tonic_prost_build::configure().compile_protos(&files, &["proto".to_owned()])?;
    Ok(())
}
