//! Header blocks (HPACK, RFC 7541), as far as an authority must be found and replaced in them.

use http::uri::Authority;

/// `:authority` in the static table (RFC 7541, appendix A). Encoders take the first entry that fits, which is this.
const AUTHORITY_INDEX: usize = 1;
const AUTHORITY_NAME: &[u8] = b":authority";

/// What became of a block.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Block {
    /// It can stay as it is.
    Fine,
    /// This is to be sent in its stead.
    Replaced(Vec<u8>),
    /// It breaks off, or is not what a header block can be.
    Malformed,
}

/// Replaces what no authority may hold in the authorities that the block spells out. Those that it only points at
/// were spelt out by an earlier block.
pub(super) fn rewrite(block: &[u8]) -> Block {
    match walk(block) {
        None => Block::Malformed,
        Some(None) => Block::Fine,
        Some(Some(replaced)) => Block::Replaced(replaced),
    }
}

/// None for a malformed block.
fn walk(block: &[u8]) -> Option<Option<Vec<u8>>> {
    let (mut rest, mut replaced, mut copied) = (block, None, 0);
    while let Some(&first) = rest.first() {
        // The prefixes of sections 6.1, 6.2.1, 6.3, 6.2.2 and 6.2.3.
        let (prefix, literal) = match first {
            0x80..=0xff => (7, false),
            0x40..=0x7f => (6, true),
            0x20..=0x3f => (5, false),
            0x00..=0x1f => (4, true),
        };
        let index = integer(&mut rest, prefix)?;
        if !literal {
            continue;
        }
        let is_authority = match index {
            0 => string(&mut rest)?.decoded()? == AUTHORITY_NAME,
            index => index == AUTHORITY_INDEX,
        };
        let before_value = block.len() - rest.len();
        let value = string(&mut rest)?;
        if is_authority && let Some(valid) = replacement(&value.decoded()?) {
            let out = replaced.get_or_insert_with(Vec::new);
            out.extend_from_slice(&block[copied..before_value]);
            push_string(&valid, out);
            copied = block.len() - rest.len();
        }
    }
    if let Some(out) = &mut replaced {
        out.extend_from_slice(&block[copied..]);
    }
    Some(replaced)
}

/// The valid authority that stands in for `value`; none if it is valid itself, or empty, which no other value of
/// its length could be.
fn replacement(value: &[u8]) -> Option<Vec<u8>> {
    if value.is_empty() || Authority::try_from(value).is_ok() {
        return None;
    }
    let bearable = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    Some(value.iter().map(|byte| if bearable(byte) { *byte } else { b'-' }).collect())
}

/// An integer with a prefix of so many bits (section 5.1); none above 32 bits.
fn integer(rest: &mut &[u8], prefix: u32) -> Option<usize> {
    let mask = (1_usize << prefix) - 1;
    let mut value = usize::from(take(rest)?) & mask;
    if value < mask {
        return Some(value);
    }
    for shift in [0, 7, 14, 21] {
        let byte = usize::from(take(rest)?);
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn take(rest: &mut &[u8]) -> Option<u8> {
    let (&first, after) = rest.split_first()?;
    *rest = after;
    Some(first)
}

/// A string literal (section 5.2).
struct Literal<'a> {
    compressed: bool,
    bytes: &'a [u8],
}

impl Literal<'_> {
    fn decoded(&self) -> Option<Vec<u8>> {
        if self.compressed { huffman(self.bytes) } else { Some(self.bytes.to_vec()) }
    }
}

fn string<'a>(rest: &mut &'a [u8]) -> Option<Literal<'a>> {
    let compressed = rest.first()? & 0x80 != 0;
    let length = integer(rest, 7)?;
    let (bytes, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(Literal { compressed, bytes })
}

/// Appends a string literal that is not compressed.
fn push_string(value: &[u8], out: &mut Vec<u8>) {
    match value.len() {
        short @ 0..0x7f => out.push(short as u8),
        long => {
            out.push(0x7f);
            let mut left = long - 0x7f;
            while left >= 0x80 {
                out.push(left as u8 | 0x80);
                left >>= 7;
            }
            out.push(left as u8);
        }
    }
    out.extend_from_slice(value);
}

/// The lengths in bits of the codes of the 256 octets and of the end (appendix B). The code is canonical: by length, then
/// by octet, each code is the one before it plus one, so that the lengths tell all.
#[rustfmt::skip]
const CODE_LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];
const LONGEST_CODE: usize = 30;

/// How many codes there are of each length.
const CODES_OF_LENGTH: [u32; LONGEST_CODE + 1] = {
    let mut counts = [0; LONGEST_CODE + 1];
    let mut symbol = 0;
    while symbol < CODE_LENGTHS.len() {
        counts[CODE_LENGTHS[symbol] as usize] += 1;
        symbol += 1;
    }
    counts
};

/// Decompresses a string; none if it holds the end's code, or ends otherwise than with at most seven bits of it. Bit by bit: a
/// connection needs this once or twice.
fn huffman(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(bytes.len() * 8 / 5);
    // The bits since the last symbol, how many, and the first code of that length.
    let (mut code, mut length, mut first) = (0_u32, 0_usize, 0_u32);
    for byte in bytes {
        for shift in (0..8).rev() {
            code = code << 1 | u32::from(byte >> shift & 1);
            first = (first + CODES_OF_LENGTH[length]) << 1;
            length += 1;
            if length > LONGEST_CODE {
                return None;
            }
            if code.wrapping_sub(first) < CODES_OF_LENGTH[length] {
                let mut symbols =
                    (0..CODE_LENGTHS.len()).filter(|at| usize::from(CODE_LENGTHS[*at]) == length);
                let symbol = symbols.nth((code - first) as usize)?;
                // 256 is the end, which may not be written out.
                decoded.push(u8::try_from(symbol).ok()?);
                (code, length, first) = (0, 0, 0);
            }
        }
    }
    // Padding is the beginning of the end's code: ones.
    (length < 8 && code == (1 << length) - 1).then_some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    /// Appendices C.4 and C.6 of RFC 7541.
    #[test]
    fn compressed_texts_are_those_of_the_rfc() {
        let examples = [
            ("f1e3c2e5f23a6ba0ab90f4ff", "www.example.com"),
            ("a8eb10649cbf", "no-cache"),
            ("25a849e95ba97d7f", "custom-key"),
            ("25a849e95bb8e8b4bf", "custom-value"),
            ("6402", "302"),
            ("aec3771a4b", "private"),
            ("d07abe941054d444a8200595040b8166e082a62d1bff", "Mon, 21 Oct 2013 20:13:21 GMT"),
            ("9d29ad171863c78f0b97c8e9ae82ae43d3", "https://www.example.com"),
            (
                "94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007",
                "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
            ),
        ];
        for (compressed, text) in examples {
            assert_eq!(huffman(&from_hex(compressed)).unwrap(), text.as_bytes());
        }
    }

    #[test]
    fn a_text_that_ends_wrongly_is_none() {
        // Eight bits of padding, padding of zeros, and the end's code itself.
        for bad in ["f1e3c2e5f23a6ba0ab90f4ffff", "f1e3c2e5f23a6ba0ab90f4fe", "fffffffc"] {
            assert_eq!(huffman(&from_hex(bad)), None, "{bad}");
        }
    }

    #[test]
    fn the_authority_alone_is_replaced() {
        // :method GET, :path as a literal, :authority compressed and then indexed, a header never to be indexed.
        let mut block = from_hex("820404");
        block.extend(b"/a%2");
        let head = block.len();
        block.extend(from_hex("418cf1e3c2e5f23a6ba0ab90f4ff"));
        block.extend(from_hex("1001610162be"));
        assert_eq!(rewrite(&block), Block::Fine);
        for (name, value) in [(&b"\x41"[..], &b"\x05a%2Fb"[..]), (b"\x00\x0a:authority", b"\x05/a//b")] {
            let mut bad = block[..head].to_vec();
            bad.extend([name, value, &block[head + 14..]].concat());
            let mut wanted = block[..head].to_vec();
            let replaced = value.iter().map(|byte| if b"%/".contains(byte) { b'-' } else { *byte });
            wanted.extend([name, &replaced.collect::<Vec<_>>(), &block[head + 14..]].concat());
            assert_eq!(rewrite(&bad), Block::Replaced(wanted));
        }
    }

    #[test]
    fn a_long_path_keeps_its_length() {
        for length in [1, 126, 127, 128, 254, 255, 300, 5000] {
            let mut block = vec![0x01];
            push_string(&vec![b'/'; length], &mut block);
            let Block::Replaced(replaced) = rewrite(&block) else { panic!("{length}") };
            assert_eq!(replaced.len(), block.len());
            assert!(replaced.ends_with(&vec![b'-'; length]));
            assert_eq!(rewrite(&replaced), Block::Fine);
        }
    }

    #[test]
    fn what_breaks_off_is_malformed() {
        let block = from_hex("418cf1e3c2e5f23a6ba0ab90f4ff");
        for end in 1..block.len() {
            assert_eq!(rewrite(&block[..end]), Block::Malformed);
        }
        assert_eq!(rewrite(&[0xff; 8]), Block::Malformed);
        assert_eq!(rewrite(b""), Block::Fine);
    }
}
