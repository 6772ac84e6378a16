//! Every number format, against values that another implementation made of the same bytes.

mod common;

use serde_json::Value;
use stoker_engine::weights::{DType, TensorView, dequant::dequantize};

/// Formats with their blocks' bytes and values.
fn cases() -> Vec<(DType, Vec<u8>, Vec<f32>)> {
    let json: Value =
        serde_json::from_slice(&std::fs::read(common::data("dequantize.json")).unwrap()).unwrap();
    let case = |c: &Value| {
        let format = *DType::ALL.iter().find(|d| d.name() == c["format"]).unwrap();
        let hex = c["bytes"].as_str().unwrap().as_bytes();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        let values = serde_json::from_value(c["values"].clone()).unwrap();
        (format, hex.chunks(2).map(byte).collect(), values)
    };
    json["cases"].as_array().unwrap().iter().map(case).collect()
}

#[test]
fn every_format_has_the_values_of_the_reference() {
    let cases = cases();
    assert_eq!(cases.len(), DType::ALL.len());
    for (format, bytes, want) in cases {
        let blocks = want.len() / format.block_len();
        assert_eq!(bytes.len(), blocks * format.block_bytes(), "{}", format.name());
        let mut got = vec![0.0; want.len()];
        dequantize(format, &bytes, &mut got);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            // A last bit: the reference does some operations in another order.
            let close = (got - want).abs() <= 2.0 * f32::EPSILON * want.abs().max(1e-3);
            assert!(close, "{} value {i}: {got}, not {want}", format.name());
        }
    }
}

#[test]
fn rows_are_parts_of_the_whole() {
    for (dtype, bytes, _) in cases().into_iter().filter(|(d, ..)| d.block_len() == 32) {
        let view = TensorView { dtype, shape: vec![4, 32], data: &bytes };
        let all = view.dequantize();
        for row in 0..4 {
            let mut out = vec![0.0; 32];
            view.dequantize_row(row, &mut out);
            assert_eq!(out, all[row * 32..][..32]);
        }
        assert_eq!((view.len(), view.rows(), view.row(3).len()), (128, 4, dtype.block_bytes()));
    }
}
