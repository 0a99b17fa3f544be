//! See `davit_shim::inputs::command_line`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| davit_fuzz::shim::command_line(data));
