//! `stoker bench`, as it is called.

use std::process::{Command, Output, Stdio};

fn stoker(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_stoker"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("the stoker binary runs")
}

#[test]
fn a_shape_that_does_not_fit_is_refused_before_anything_is_printed() {
    let args =
        ["bench", "--shape", "llama-3-8b", "--backend", "cpu", "--prompt", "16777216", "--batch", "4096"];
    let output = stoker(&args);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success());
    assert!(err.contains("llama-3-8b in Q4_1 takes "), "{err}");
    assert_eq!(out, "");
}

#[test]
fn nothing_is_measured_zero_times() {
    for flag in ["--prompt", "--batch", "--tokens", "--repetitions"] {
        let output = stoker(&["bench", "--shape", "llama-3-8b", flag, "0"]);
        assert_eq!(output.status.code(), Some(2), "{flag}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
