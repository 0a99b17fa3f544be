//! The frames of a client's half of an HTTP/2 connection, as far as header blocks must be found in them
//! (RFC 9113, sections 3.4, 4.1, 6.2 and 6.10).

use super::header_block::{self, Block};

/// What a client sends first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEADER: usize = 9;
const HEADERS: u8 = 0x1;
const CONTINUATION: u8 = 0x9;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// The stream dependency and weight of a HEADERS frame with [`PRIORITY`].
const PRIORITY_LENGTH: usize = 5;
/// The longest frame that a server which says nothing else accepts.
const LONGEST_FRAME: usize = 16 << 10;
/// The most bytes of one header block that are held back; what is longer is passed on as it came. The server
/// itself refuses more than 16 KiB of headers.
const LONGEST_BLOCK: usize = 64 << 10;

/// Whether the rest of the connection needs a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// It does.
    More,
    /// What follows is passed on as it comes.
    Done,
}

impl Progress {
    /// True for [`Progress::Done`].
    pub(super) fn is_done(self) -> bool {
        self == Progress::Done
    }
}

/// Where in the stream of bytes the rewriter is.
#[derive(Debug)]
enum At {
    /// So many bytes of the preface have been seen.
    Preface(usize),
    /// Between two frames, or in the header of one, which is held back.
    Frame,
    /// So many bytes of a frame are left that is of no interest.
    Payload(usize),
    /// In a header block, whose frames are held back.
    Block,
}

/// Rewrites the header blocks of one connection.
#[derive(Debug)]
pub(super) struct Rewriter {
    at: At,
    /// The frames that are held back, whole from the header of the first.
    held: Vec<u8>,
    /// Where in `held` the last frame begins.
    last: usize,
    /// True once a block had to be changed.
    replacing: bool,
    /// True once a frame has begun.
    begun: bool,
}

impl Default for Rewriter {
    fn default() -> Self {
        Rewriter { at: At::Preface(0), held: Vec::new(), last: 0, replacing: false, begun: false }
    }
}

impl Rewriter {
    /// Takes what the client sent and appends to `out` what the server may read.
    pub(super) fn feed(&mut self, mut input: &[u8], out: &mut Vec<u8>) -> Progress {
        // Each turn ends a state; what needs more input returns.
        loop {
            match self.at {
                At::Preface(_) | At::Payload(_) if input.is_empty() => return Progress::More,
                At::Preface(seen) => {
                    let count = input.len().min(PREFACE.len() - seen);
                    let (now, rest) = input.split_at(count);
                    if now != &PREFACE[seen..seen + count] {
                        return self.give_up(input, out);
                    }
                    out.extend_from_slice(now);
                    input = rest;
                    self.at =
                        if seen + count == PREFACE.len() { At::Frame } else { At::Preface(seen + count) };
                }
                At::Payload(left) => {
                    let (now, rest) = input.split_at(input.len().min(left));
                    out.extend_from_slice(now);
                    input = rest;
                    self.at = if now.len() == left { At::Frame } else { At::Payload(left - now.len()) };
                }
                At::Frame => {
                    self.hold(&mut input, FRAME_HEADER);
                    if self.held.len() < FRAME_HEADER {
                        return Progress::More;
                    }
                    self.begun = true;
                    if self.held[3] == HEADERS {
                        (self.at, self.last) = (At::Block, 0);
                    } else {
                        self.at = match length(&self.held) {
                            0 => At::Frame,
                            length => At::Payload(length),
                        };
                        out.append(&mut self.held);
                    }
                }
                At::Block => {
                    self.hold(&mut input, self.last + FRAME_HEADER);
                    if self.held.len() < self.last + FRAME_HEADER {
                        return Progress::More;
                    }
                    let frame = &self.held[self.last..];
                    // Nothing may stand between the frames of a block.
                    let foreign =
                        self.last > 0 && (frame[3] != CONTINUATION || frame[5..9] != self.held[5..9]);
                    let end = self.last + FRAME_HEADER + length(frame);
                    if foreign || end > LONGEST_BLOCK {
                        return self.give_up(input, out);
                    }
                    self.hold(&mut input, end);
                    if self.held.len() < end {
                        return Progress::More;
                    }
                    if self.held[self.last + 4] & END_HEADERS == 0 {
                        self.last = end;
                        continue;
                    }
                    if self.block_ended(out).is_done() {
                        return self.give_up(input, out);
                    }
                }
            }
        }
    }

    /// Whether the client has sent its preface and the head of a frame.
    pub(super) fn has_begun(&self) -> bool {
        self.begun
    }

    /// Gives what is held back: no more comes.
    pub(super) fn finish(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.held);
    }

    /// Holds bytes back until there are `total`.
    fn hold(&mut self, input: &mut &[u8], total: usize) {
        let count = total.saturating_sub(self.held.len()).min(input.len());
        let (now, rest) = input.split_at(count);
        self.held.extend_from_slice(now);
        *input = rest;
    }

    fn give_up(&mut self, input: &[u8], out: &mut Vec<u8>) -> Progress {
        out.append(&mut self.held);
        out.extend_from_slice(input);
        Progress::Done
    }

    /// Passes on the block that is held back, changed if need be.
    fn block_ended(&mut self, out: &mut Vec<u8>) -> Progress {
        let changed = fragments(&self.held).map(|(first, block)| (first, header_block::rewrite(&block)));
        self.at = At::Frame;
        match changed {
            Some((first, Block::Replaced(block))) => {
                self.replacing = true;
                write_block(&first, &block, out);
                self.held.clear();
                Progress::More
            }
            Some((_, Block::Fine)) if self.replacing => {
                out.append(&mut self.held);
                Progress::More
            }
            Some((_, Block::Fine | Block::Malformed)) | None => Progress::Done,
        }
    }
}

/// The length of the payload that a frame's header tells.
fn length(frame: &[u8]) -> usize {
    usize::from(frame[0]) << 16 | usize::from(frame[1]) << 8 | usize::from(frame[2])
}

/// What a rewritten block keeps of its HEADERS frame.
#[derive(Debug)]
struct First {
    flags: u8,
    stream: [u8; 4],
    priority: Vec<u8>,
}

/// Takes the frames of one block apart; none if their padding or priority does not fit.
fn fragments(mut frames: &[u8]) -> Option<(First, Vec<u8>)> {
    let (flags, stream) = (frames[4], frames[5..9].try_into().ok()?);
    let mut first = First { flags: flags & !(PADDED | END_HEADERS), stream, priority: Vec::new() };
    let mut block = Vec::with_capacity(frames.len());
    let mut is_first = true;
    while !frames.is_empty() {
        let (frame, rest) = frames.split_at(FRAME_HEADER + length(frames));
        let mut payload = &frame[FRAME_HEADER..];
        if is_first {
            if flags & PADDED != 0 {
                let (&padding, padded) = payload.split_first()?;
                payload = &padded[..padded.len().checked_sub(usize::from(padding))?];
            }
            if flags & PRIORITY != 0 {
                let (priority, fragment) = payload.split_at_checked(PRIORITY_LENGTH)?;
                first.priority = priority.to_vec();
                payload = fragment;
            }
            is_first = false;
        }
        block.extend_from_slice(payload);
        frames = rest;
    }
    Some((first, block))
}

/// Writes a block as one HEADERS frame and as many CONTINUATION frames as it takes.
fn write_block(first: &First, block: &[u8], out: &mut Vec<u8>) {
    let room = LONGEST_FRAME - first.priority.len();
    let (mut now, mut rest) = block.split_at(block.len().min(room));
    let (mut kind, mut flags, mut priority) = (HEADERS, first.flags, first.priority.as_slice());
    loop {
        let end = if rest.is_empty() { END_HEADERS } else { 0 };
        // At most 16 KiB: three bytes hold it.
        let length = (priority.len() + now.len()) as u32;
        out.extend_from_slice(&length.to_be_bytes()[1..]);
        out.extend_from_slice(&[kind, flags | end]);
        out.extend_from_slice(&first.stream);
        out.extend_from_slice(priority);
        out.extend_from_slice(now);
        if rest.is_empty() {
            return;
        }
        (now, rest) = rest.split_at(rest.len().min(LONGEST_FRAME));
        (kind, flags, priority) = (CONTINUATION, 0, &[]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        frame
    }

    /// `:authority` as a literal to be indexed, not compressed.
    fn authority(value: &str) -> Vec<u8> {
        let mut block = vec![0x83, 0x41, value.len() as u8];
        block.extend(value.as_bytes());
        block
    }

    fn rewrite(input: &[u8], cuts: &[usize]) -> (Vec<u8>, Progress) {
        let (mut rewriter, mut out, mut begun) = (Rewriter::default(), Vec::new(), 0);
        for end in cuts.iter().map(|cut| cut % (input.len() + 1)).chain([input.len()]) {
            if end > begun {
                if rewriter.feed(&input[begun..end], &mut out).is_done() {
                    out.extend(&input[end..]);
                    return (out, Progress::Done);
                }
                begun = end;
            }
        }
        rewriter.finish(&mut out);
        (out, Progress::More)
    }

    const SETTINGS: u8 = 0x4;
    const DATA: u8 = 0x0;

    fn connection(blocks: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = PREFACE.to_vec();
        bytes.extend(frame(SETTINGS, 0, 0, b""));
        for (at, block) in blocks.iter().enumerate() {
            bytes.extend(block);
            bytes.extend(frame(DATA, 1, 2 * at as u32 + 1, b"\0\0\0\0\0"));
        }
        bytes
    }

    #[test]
    fn a_valid_authority_ends_the_look() {
        let input = connection(&[frame(HEADERS, END_HEADERS, 1, &authority("localhost"))]);
        assert_eq!(rewrite(&input, &[]), (input, Progress::Done));
    }

    #[test]
    fn a_path_becomes_an_authority_of_the_same_length_in_every_call() {
        let call = |stream, value| frame(HEADERS, END_HEADERS, stream, &authority(value));
        let input = connection(&[call(1, "run%2Fx.sock"), call(3, "localhost"), call(5, "/run/x.sock")]);
        let wanted = connection(&[call(1, "run-2Fx.sock"), call(3, "localhost"), call(5, "-run-x.sock")]);
        assert_eq!(rewrite(&input, &[]), (wanted, Progress::More));
    }

    #[test]
    fn padding_goes_and_priority_stays() {
        let mut payload = vec![2, 0, 0, 0, 0, 16];
        payload.extend(authority("a%2Fb"));
        payload.extend([0, 0]);
        let input = connection(&[frame(HEADERS, END_HEADERS | PADDED | PRIORITY | 1, 1, &payload)]);
        let mut payload = vec![0, 0, 0, 0, 16];
        payload.extend(authority("a-2Fb"));
        let wanted = connection(&[frame(HEADERS, END_HEADERS | PRIORITY | 1, 1, &payload)]);
        assert_eq!(rewrite(&input, &[]).0, wanted);
    }

    #[test]
    fn a_block_of_several_frames_is_one() {
        let block = authority("a%2Fb");
        let mut frames = frame(HEADERS, 0, 1, &block[..2]);
        frames.extend(frame(CONTINUATION, 0, 1, b""));
        frames.extend(frame(CONTINUATION, END_HEADERS, 1, &block[2..]));
        let wanted = connection(&[frame(HEADERS, END_HEADERS, 1, &authority("a-2Fb"))]);
        assert_eq!(rewrite(&connection(&[frames]), &[]).0, wanted);
    }

    #[test]
    fn a_block_that_ends_with_an_empty_frame_waits_for_nothing() {
        let mut input = PREFACE.to_vec();
        input.extend(frame(HEADERS, 0, 1, &authority("a%2Fb")));
        input.extend(frame(CONTINUATION, END_HEADERS, 1, b""));
        let mut wanted = PREFACE.to_vec();
        wanted.extend(frame(HEADERS, END_HEADERS, 1, &authority("a-2Fb")));
        let (mut rewriter, mut out) = (Rewriter::default(), Vec::new());
        assert_eq!(rewriter.feed(&input, &mut out), Progress::More);
        assert_eq!(out, wanted);
    }

    #[test]
    fn a_long_block_is_several_frames_again() {
        let mut block = authority("a%2Fb");
        // A literal of 20,000 bytes that is not indexed: the length is 127 + 19873 in seven bits each.
        block.extend([0x00, 1, b'x', 0x7f, 0xa1, 0x9b, 0x01]);
        block.extend(vec![b'y'; 20_000]);
        let mut frames = frame(HEADERS, 0, 1, &block[..100]);
        frames.extend(frame(CONTINUATION, 0, 1, &block[100..10_000]));
        frames.extend(frame(CONTINUATION, END_HEADERS, 1, &block[10_000..]));
        block[4] = b'-';
        assert_eq!(block[3..8], *b"a-2Fb");
        let mut wanted = frame(HEADERS, 0, 1, &block[..LONGEST_FRAME]);
        wanted.extend(frame(CONTINUATION, END_HEADERS, 1, &block[LONGEST_FRAME..]));
        assert_eq!(rewrite(&connection(&[frames]), &[]).0, connection(&[wanted]));
    }

    #[test]
    fn what_is_not_understood_is_passed_on() {
        let bad = authority("a%2Fb");
        let mut foreign = frame(HEADERS, 0, 1, &bad[..2]);
        foreign.extend(frame(CONTINUATION, END_HEADERS, 3, &bad[2..]));
        let mut endless = frame(HEADERS, 0, 1, &bad);
        (0..8).for_each(|_| endless.extend(frame(CONTINUATION, 0, 1, &[0; 16 << 10])));
        let padded = frame(HEADERS, END_HEADERS | PADDED, 1, &[200, 0]);
        let cut = frame(HEADERS, END_HEADERS, 1, &bad[..4]);
        for frames in [foreign, endless, padded, cut] {
            let input = connection(&[frames]);
            assert_eq!(rewrite(&input, &[]), (input, Progress::Done));
        }
    }

    proptest! {
        #[test]
        fn where_reads_end_does_not_matter(mut cuts in proptest::collection::vec(0..500_usize, 0..20)) {
            cuts.sort_unstable();
            let call = |stream, value| frame(HEADERS, END_HEADERS, stream, &authority(value));
            let input = connection(&[call(1, "run%2Fx.sock"), call(3, "/run/x.sock")]);
            prop_assert_eq!(rewrite(&input, &cuts), rewrite(&input, &[]));
        }

        #[test]
        fn no_bytes_are_lost_or_panicked_at(bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0..300_usize) {
            let mut input = PREFACE.to_vec();
            input.extend(&bytes);
            let (out, _) = rewrite(&input, &[cut]);
            prop_assert!(out.len() + 256 >= input.len());
            let (out, _) = rewrite(&bytes, &[cut]);
            prop_assert_eq!(out, bytes);
        }
    }
}
