//! Compressed clusters (section "Compressed Clusters Descriptor"), made whole.
//!
//! Output goes straight into a buffer of one cluster, and no decoder writes, or remembers, more than that: whatever a stream
//! says of itself, memory is fixed when the [`Inflater`] is made, and time goes with the lengths of input and output.

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use zstd_safe::{DCtx, find_frame_compressed_size};

use crate::header::Compression;

/// The stream of a compressed cluster is malformed, or does not fill its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a compressed cluster cannot be read: its stream is malformed, or is not that of a whole cluster")]
pub struct InflateError;

/// A decoder, for one stream after the other.
pub struct Inflater(Decoder);

enum Decoder {
    Deflate(Box<DecompressorOxide>),
    Zstd(DCtx<'static>),
}

impl Inflater {
    /// A decoder for an image's compressed clusters. It takes some 10 KiB for deflate and some 100 KiB for zstd.
    #[must_use]
    pub fn new(compression: Compression) -> Self {
        Self(match compression {
            Compression::Deflate => Decoder::Deflate(Box::default()),
            Compression::Zstd => Decoder::Zstd(DCtx::create()),
        })
    }

    /// Fills `cluster`, which is as long as a cluster, from a stream, which may be followed by anything up to the end of
    /// its last sector.
    ///
    /// # Errors
    /// The stream is malformed, ends early, or is not that of a whole cluster. What the buffer holds then means nothing.
    pub fn inflate(&mut self, stream: &[u8], cluster: &mut [u8]) -> Result<(), InflateError> {
        let filled = match &mut self.0 {
            Decoder::Deflate(decoder) => deflate(decoder, stream, cluster),
            Decoder::Zstd(decoder) => zstd(decoder, stream, cluster),
        };
        if filled { Ok(()) } else { Err(InflateError) }
    }
}

/// Whether a raw deflate stream fills the cluster. It need not say that it ends there: QEMU does not ask for that.
fn deflate(decoder: &mut DecompressorOxide, stream: &[u8], cluster: &mut [u8]) -> bool {
    decoder.init();
    let (status, _, len) = decompress(decoder, stream, cluster, 0, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF);
    // More input is asked for where the last sector ends before the mark of the stream's end.
    let no_error = matches!(
        status,
        TINFLStatus::Done
            | TINFLStatus::HasMoreOutput
            | TINFLStatus::NeedsMoreInput
            | TINFLStatus::FailedCannotMakeProgress
    );
    no_error && len == cluster.len()
}

/// Whether zstd frames fill the cluster.
fn zstd(decoder: &mut DCtx<'_>, mut stream: &[u8], mut cluster: &mut [u8]) -> bool {
    while !cluster.is_empty() {
        let Ok(frame) = find_frame_compressed_size(stream) else { return false };
        let Some((frame, rest)) = stream.split_at_checked(frame) else { return false };
        // A frame without content takes some bytes of the stream, so this ends.
        let Ok(len) = decoder.decompress(cluster, frame) else { return false };
        cluster = &mut cluster[len..];
        stream = rest;
    }
    true
}

#[cfg(test)]
mod tests {
    use miniz_oxide::deflate::compress_to_vec;

    use super::*;

    const CLUSTER: usize = 65536;

    fn content() -> Vec<u8> {
        (0..CLUSTER).map(|at| (at * at / 777) as u8).collect()
    }

    fn compress(compression: Compression, content: &[u8]) -> Vec<u8> {
        match compression {
            Compression::Deflate => compress_to_vec(content, 6),
            Compression::Zstd => {
                let mut stream = vec![0; zstd_safe::compress_bound(content.len())];
                let len = zstd_safe::compress(&mut stream[..], content, 3).expect("there is room");
                stream.truncate(len);
                stream
            }
        }
    }

    fn both(test: impl Fn(Compression, &mut Inflater)) {
        for compression in [Compression::Deflate, Compression::Zstd] {
            test(compression, &mut Inflater::new(compression));
        }
    }

    #[test]
    fn a_stream_fills_its_cluster_whatever_follows_it() {
        both(|compression, inflater| {
            let mut stream = compress(compression, &content());
            for padding in [0, 1, 511, 4096] {
                stream.resize(stream.len() + padding, 0xa5);
                let mut cluster = vec![0; CLUSTER];
                assert_eq!(inflater.inflate(&stream, &mut cluster), Ok(()), "{compression:?}, {padding}");
                assert!(cluster == content());
            }
        });
    }

    #[test]
    fn a_stream_that_is_cut_off_or_too_short_is_an_error_and_the_next_one_is_not() {
        both(|compression, inflater| {
            let stream = compress(compression, &content());
            let mut cluster = vec![0; CLUSTER];
            for len in [0, 1, 2, 5, stream.len() / 2, stream.len() - 20] {
                assert_eq!(inflater.inflate(&stream[..len], &mut cluster), Err(InflateError), "{len}");
            }
            let short = compress(compression, &content()[..CLUSTER - 1]);
            assert_eq!(inflater.inflate(&short, &mut cluster), Err(InflateError));
            assert_eq!(inflater.inflate(&stream, &mut cluster), Ok(()));
            assert!(cluster == content());
        });
    }

    /// A gigabyte of zeros in a megabyte or less: neither is written beyond the cluster, nor decoded.
    #[test]
    fn a_bomb_does_not_go_off() {
        both(|compression, inflater| {
            let bomb = compress(compression, &vec![0; 256 << 20]);
            let mut room = vec![7; 2 * CLUSTER];
            // What deflate has brought by then is as good a cluster as any; a frame has to end with it.
            let expected = if compression == Compression::Deflate { Ok(()) } else { Err(InflateError) };
            assert_eq!(inflater.inflate(&bomb, &mut room[..CLUSTER]), expected);
            assert!(room[CLUSTER..].iter().all(|&byte| byte == 7));
        });
    }

    #[test]
    fn frames_may_come_in_pieces_and_ones_without_content_do_not_hold_up() {
        let mut inflater = Inflater::new(Compression::Zstd);
        let (first, second) = (content()[..1000].to_vec(), content()[1000..].to_vec());
        let empty = compress(Compression::Zstd, &[]);
        let frames =
            [compress(Compression::Zstd, &first), empty.repeat(1000), compress(Compression::Zstd, &second)];
        let mut cluster = vec![0; CLUSTER];
        assert_eq!(inflater.inflate(&frames.concat(), &mut cluster), Ok(()));
        assert!(cluster == content());
        assert_eq!(inflater.inflate(&empty.repeat(10_000), &mut cluster), Err(InflateError));
        // A frame that may be skipped.
        let skipped =
            [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3][..], &compress(Compression::Zstd, &content())];
        assert_eq!(inflater.inflate(&skipped.concat(), &mut cluster), Ok(()));
    }

    proptest::proptest! {
        #[test]
        fn no_garbage_panics_or_writes_beyond_the_cluster(
            garbage in proptest::collection::vec(proptest::num::u8::ANY, 0..2000),
            at in 0..1000_usize,
            zstd: bool,
        ) {
            let compression = if zstd { Compression::Zstd } else { Compression::Deflate };
            let mut inflater = Inflater::new(compression);
            let mut room = vec![7; CLUSTER + 64];
            let _ = inflater.inflate(&garbage, &mut room[..CLUSTER]);
            let mut stream = compress(compression, &content());
            let at = at.min(stream.len() - 1);
            let len = garbage.len().min(stream.len() - at);
            stream[at..at + len].copy_from_slice(&garbage[..len]);
            let _ = inflater.inflate(&stream, &mut room[..CLUSTER]);
            proptest::prop_assert!(room[CLUSTER..].iter().all(|&byte| byte == 7));
            let stream = compress(compression, &content());
            proptest::prop_assert_eq!(inflater.inflate(&stream, &mut room[..CLUSTER]), Ok(()));
        }
    }
}
