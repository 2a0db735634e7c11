//! What stands before each question to the name server, and before each answer.

/// Length of a header in bytes.
pub const QUESTION_HEADER: usize = 7;

/// Says what follows: a DNS message without the length that it has over TCP (RFC 1035, 4.2).
///
/// On the wire: the number as four bytes, one byte that is 1 for a message over TCP and 0 for one over UDP, the length of
/// the message as two bytes; most significant bytes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuestionHeader {
    /// The question's number, the same before its answer.
    pub number: u32,
    /// Whether it was asked over TCP, as it is to be passed on.
    pub over_tcp: bool,
    /// Bytes that follow.
    pub length: u16,
}

impl QuestionHeader {
    /// The bytes.
    pub fn encode(self) -> [u8; QUESTION_HEADER] {
        let [a, b, c, d] = self.number.to_be_bytes();
        let [high, low] = self.length.to_be_bytes();
        [a, b, c, d, self.over_tcp.into(), high, low]
    }

    /// What the bytes say; `None` if the fifth is neither 0 nor 1.
    pub fn decode(bytes: [u8; QUESTION_HEADER]) -> Option<Self> {
        let [a, b, c, d, kind, high, low] = bytes;
        let over_tcp = match kind {
            0 => false,
            1 => true,
            _ => return None,
        };
        let (number, length) = (u32::from_be_bytes([a, b, c, d]), u16::from_be_bytes([high, low]));
        Some(Self { number, over_tcp, length })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_comes_back_as_it_was() {
        for over_tcp in [false, true] {
            let header = QuestionHeader { number: 0x0102_0304, over_tcp, length: 0x0506 };
            assert_eq!(header.encode(), [1, 2, 3, 4, over_tcp.into(), 5, 6]);
            assert_eq!(QuestionHeader::decode(header.encode()), Some(header));
        }
    }

    #[test]
    fn header_of_another_kind_is_none() {
        assert_eq!(QuestionHeader::decode([0, 0, 0, 0, 2, 0, 0]), None);
    }
}
