//! What the agent in the guest says: replies and events as the supervisor reads them.

use arbitrary::{Result, Unstructured};
use stockade::fuzzing;

/// Longest text that the supervisor shows of a guest.
const SHOWN: usize = 4400;

pub fn run(input: &[u8]) {
    let mut bytes = Unstructured::new(input);
    let mut said = Vec::new();
    // The input's end is the conversation's.
    let _ = speak(&mut bytes, &mut said);
    let shown = fuzzing::talk_to_agent(&said).expect("a call to an agent that has hung up did not end");
    for text in shown {
        assert!(text.len() <= SHOWN, "{} bytes of a guest's message are shown", text.len());
        assert!(!text.contains(char::is_control), "control characters of a guest are shown: {text:?}");
    }
}

/// Frames of ttrpc: length, stream, type, flags, payload. Some lie about their length, and some are none.
fn speak(bytes: &mut Unstructured, said: &mut Vec<u8>) -> Result<()> {
    while !bytes.is_empty() {
        if bytes.ratio(1, 20)? {
            let garbage = bytes.arbitrary_len::<u8>()?.min(64);
            said.extend(bytes.bytes(garbage)?);
            continue;
        }
        let payload = message(bytes)?;
        let length = match bytes.int_in_range(0..=15u8)? {
            0 => bytes.arbitrary()?,
            1 => 4 << 20,
            2 => (4 << 20) + 1,
            _ => payload.len() as u32,
        };
        // The supervisor's calls are odd.
        let stream: u32 =
            if bytes.ratio(9, 10)? { bytes.int_in_range(0..=15)? } else { bytes.arbitrary()? };
        let kind = if bytes.ratio(9, 10)? { *bytes.choose(&[2, 3])? } else { bytes.arbitrary::<u8>()? };
        let flags = if bytes.ratio(1, 2)? { 0 } else { bytes.arbitrary::<u8>()? };
        said.extend(length.to_be_bytes());
        said.extend(stream.to_be_bytes());
        said.extend([kind, flags]);
        said.extend(payload);
    }
    Ok(())
}

/// Protobuf, more or less.
fn message(bytes: &mut Unstructured) -> Result<Vec<u8>> {
    let mut message = Vec::new();
    for _ in 0..bytes.int_in_range(0..=6u8)? {
        let field = bytes.int_in_range(0..=12u8)?;
        let wire = *bytes.choose(&[0, 2, 2, 1, 5, 7])?;
        message.push(field << 3 | wire);
        match wire {
            0 => {
                let mut value: u64 = bytes.arbitrary()?;
                while value > 0x7f {
                    message.push(value as u8 | 0x80);
                    value >>= 7;
                }
                message.push(value as u8);
            }
            2 => {
                let n = bytes.int_in_range(0..=40u8)?;
                let content = bytes.bytes(usize::from(n).min(bytes.len()))?;
                message.push(if bytes.ratio(9, 10)? { content.len() as u8 } else { n });
                // A message in a message is as likely as text.
                message.extend(content);
            }
            _ => message.extend(bytes.bytes(bytes.len().min(8))?),
        }
    }
    Ok(message)
}
