//! The header as a C compiler sees it, and the library as a C program uses it.

use std::path::{Path, PathBuf};
use std::process::Command;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

/// Where cargo put libffreduce.so: next to this test, or one folder up.
fn library_folder() -> PathBuf {
    let mut folder = std::env::current_exe().unwrap();
    while folder.pop() {
        if folder.join("libffreduce.so").exists() {
            return folder;
        }
    }
    panic!("libffreduce.so was not built");
}

#[test]
fn the_c_example_compiles_and_runs() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("allreduce");
    let library = library_folder();
    let compiled = Command::new("cc")
        .args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"])
        .arg(folder().join("examples/allreduce.c"))
        .arg(format!("-I{}", folder().join("include").display()))
        .arg(format!("-L{}", library.display()))
        .arg("-lffreduce")
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    for nodes in [["a", "a"], ["a", "b"]] {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let ranks: Vec<_> = (0..2)
            .map(|rank| {
                Command::new(&program)
                    .env("LD_LIBRARY_PATH", &library)
                    .env("RANK", rank.to_string())
                    .env("WORLD_SIZE", "2")
                    .env("MASTER_ADDR", "127.0.0.1")
                    .env("MASTER_PORT", port.to_string())
                    .env("FIREFLY_NODE_ID", nodes[rank])
                    .env("FIREFLY_JOB_SECRET", "5a".repeat(32))
                    .stdout(std::process::Stdio::piped())
                    .spawn()
                    .unwrap()
            })
            .collect();
        for (rank, child) in ranks.into_iter().enumerate() {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "rank {rank}: {}", output.status);
            let said = String::from_utf8_lossy(&output.stdout);
            assert_eq!(said, format!("rank {rank} of 2: sum of element 1 is 3\n"));
        }
    }
}

#[test]
fn the_header_is_c_and_cpp_and_agrees_with_the_library() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("sizes.cc");
    let checks = [
        ("ffr_config", size_of::<ffreduce::FfrConfig>()),
        ("ffr_args", size_of::<ffreduce::FfrArgs>()),
        ("ffr_buf", size_of::<ffreduce::FfrBuf>()),
        ("ffr_stats", size_of::<ffreduce::FfrStats>()),
        ("ffr_store", size_of::<ffreduce::FfrStore>()),
    ];
    let numbers = [
        ("FFR_PENDING", ffreduce::FFR_PENDING),
        ("FFR_ERR_INTERNAL", ffreduce::FFR_ERR_INTERNAL),
        ("FFR_ERR_INVALID", ffreduce::FFR_ERR_INVALID),
        ("FFR_ERR_UNAVAILABLE", ffreduce::FFR_ERR_UNAVAILABLE),
        ("FFR_ERR_TIMEOUT", ffreduce::FFR_ERR_TIMEOUT),
        ("FFR_ERR_CORRUPT", ffreduce::FFR_ERR_CORRUPT),
        ("FFR_ERR_UNSUPPORTED", ffreduce::FFR_ERR_UNSUPPORTED),
        ("FFR_ERR_ABORTED", ffreduce::FFR_ERR_ABORTED),
        ("FFR_ERR_MISMATCH", ffreduce::FFR_ERR_MISMATCH),
        ("FFR_ERR_PEER_DIED", ffreduce::FFR_ERR_PEER_DIED),
    ];
    let mut text = String::from("#include \"ffreduce.h\"\n");
    for (name, size) in checks {
        text += &format!("static_assert(sizeof({name}) == {size}, \"{name}\");\n");
    }
    for (name, number) in numbers {
        text += &format!("static_assert({name} == {number}, \"{name}\");\n");
    }
    std::fs::write(&source, text).unwrap();
    let compiled = Command::new("c++")
        .args(["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"])
        .arg(format!("-I{}", folder().join("include").display()))
        .arg(&source)
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
}

#[test]
fn without_a_group_functions_say_so() {
    let mut comm = std::ptr::null_mut();
    // SAFETY: null pointers are what the functions promise to refuse.
    unsafe {
        assert_eq!(ffreduce::ffr_comm_create(std::ptr::null(), &raw mut comm), ffreduce::FFR_ERR_INVALID);
        let mut text = [1 as std::ffi::c_char; 12];
        let whole = ffreduce::ffr_last_error(text.as_mut_ptr(), text.len());
        assert!(whole > text.len(), "the length of the whole text");
        assert_eq!(text[11], 0, "cut and terminated");
        assert_eq!(
            ffreduce::ffr_submit(comm, std::ptr::null(), std::ptr::null_mut()),
            ffreduce::FFR_ERR_INVALID
        );
        assert_eq!(ffreduce::ffr_op_wait(std::ptr::null_mut(), -1), ffreduce::FFR_ERR_INVALID);
        ffreduce::ffr_op_free(std::ptr::null_mut());
        ffreduce::ffr_comm_destroy(std::ptr::null_mut());
    }
    assert_eq!(ffreduce::ffr_dtype_size(14), 16);
    assert_eq!(ffreduce::ffr_dtype_size(17), 0);
}
