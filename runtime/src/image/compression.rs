//! Layers as they are stored: plain, gzip (RFC 1952) or zstd (RFC 8878). Both decoders are in safe Rust, since what
//! they read comes from strangers.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

const BUFFER: usize = 128 << 10;
/// How far back a zstd frame may refer, and so how much memory it takes: what `zstd --ultra -22` uses.
const WINDOW_MAX: u64 = 128 << 20;

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, of one or several members.
    Gzip,
    /// zstd, of one or several frames.
    Zstd,
}

impl Compression {
    /// By a layer's media type (OCI image-spec, layer.md; Docker image manifest version 2, schema 2).
    pub fn of_media_type(media_type: &str) -> Option<Self> {
        let kind = media_type
            .strip_prefix("application/vnd.oci.image.layer.v1.tar")
            .or_else(|| media_type.strip_prefix("application/vnd.oci.image.layer.nondistributable.v1.tar"))
            .or_else(|| media_type.strip_prefix("application/vnd.docker.image.rootfs.diff.tar"))
            .or_else(|| media_type.strip_prefix("application/vnd.docker.image.rootfs.foreign.diff.tar"))?;
        match kind {
            "" => Some(Self::None),
            "+gzip" | ".gzip" => Some(Self::Gzip),
            "+zstd" | ".zstd" => Some(Self::Zstd),
            _ => None,
        }
    }

    /// By how the content begins, where nothing says it.
    pub fn of_content(first: &[u8]) -> Self {
        match first {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// A reader of the content.
    pub fn decode<'a>(self, input: impl Read + 'a) -> Box<dyn Read + 'a> {
        let input = BufReader::with_capacity(BUFFER, input);
        match self {
            Self::None => Box::new(input),
            Self::Gzip => Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(input))),
            Self::Zstd => Box::new(BufReader::with_capacity(BUFFER, Zstd::new(input))),
        }
    }
}

/// Frames one after the other.
struct Zstd<R> {
    input: R,
    decoder: FrameDecoder,
    inside: bool,
}

impl<R: BufRead> Zstd<R> {
    fn new(input: R) -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(WINDOW_MAX);
        Zstd { input, decoder, inside: false }
    }

    /// Begins the next frame; false at the end of the input.
    fn begin(&mut self) -> io::Result<bool> {
        loop {
            if self.input.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.init(&mut self.input) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    if io::copy(&mut (&mut self.input).take(length), &mut io::sink())? < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(e) => return Err(io::Error::other(e)),
            }
        }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.inside {
                self.inside = self.begin()?;
                if !self.inside {
                    return Ok(0);
                }
            }
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(buffer);
            }
            if self.decoder.is_finished() {
                let written = self.decoder.get_checksum_from_data();
                if written.is_some() && written != self.decoder.get_calculated_checksum() {
                    return Err(io::Error::other("a zstd frame has the wrong checksum"));
                }
                self.inside = false;
                continue;
            }
            let one = BlockDecodingStrategy::UptoBlocks(1);
            self.decoder.decode_blocks(&mut self.input, one).map_err(io::Error::other)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    fn decoded(compression: Compression, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        compression.decode(bytes).read_to_end(&mut all).map(|_| all)
    }

    #[test]
    fn several_members_and_frames_are_one_content() {
        let (a, b) = (vec![b'a'; 300_000], b"the end".to_vec());
        let whole = [a.clone(), b.clone()].concat();
        assert_eq!(decoded(Compression::Gzip, &[gzip(&a), gzip(&b)].concat()).unwrap(), whole);
        let skippable = b"\x50\x2a\x4d\x18\x04\0\0\0skip".to_vec();
        let frames = [zstd(&a), skippable, zstd(&b)].concat();
        assert_eq!(decoded(Compression::Zstd, &frames).unwrap(), whole);
        assert_eq!(decoded(Compression::None, &whole).unwrap(), whole);
    }

    #[test]
    fn what_is_cut_off_or_something_else_is_an_error() {
        let bytes: Vec<u8> = (0..100_000_u32).flat_map(|n| n.wrapping_mul(n).to_le_bytes()).collect();
        for (compression, packed) in [(Compression::Gzip, gzip(&bytes)), (Compression::Zstd, zstd(&bytes))] {
            decoded(compression, &packed[..packed.len() - 9]).unwrap_err();
            decoded(compression, &packed[..packed.len() / 2]).unwrap_err();
            decoded(compression, b"something else entirely").unwrap_err();
        }
    }

    #[test]
    fn a_frame_that_wants_too_much_memory_is_refused() {
        // RFC 8878, 3.1.1.1: magic, a descriptor without content size, a window of 2^41 bytes.
        let hungry = b"\x28\xb5\x2f\xfd\x00\xf8\x01\x00\x00";
        assert!(decoded(Compression::Zstd, hungry).is_err());
    }

    #[test]
    fn media_types_of_both_families_are_known() {
        for (media_type, compression) in [
            ("application/vnd.oci.image.layer.v1.tar", Some(Compression::None)),
            ("application/vnd.oci.image.layer.v1.tar+gzip", Some(Compression::Gzip)),
            ("application/vnd.oci.image.layer.v1.tar+zstd", Some(Compression::Zstd)),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Some(Compression::Gzip)),
            ("application/vnd.oci.image.layer.v1.tar+zstd:chunked", None),
            ("application/vnd.oci.image.layer.v1.tar+encrypted", None),
            ("application/octet-stream", None),
        ] {
            assert_eq!(Compression::of_media_type(media_type), compression, "{media_type}");
        }
    }
}
