//! What a guest says, or a bundle, fit for a terminal and for a log: short, on one line, and without a character that does
//! anything there.

/// Longest error, in characters. Those that name a path or two of the longest that there can be are cut.
const ERROR_MAX: usize = 4000;

/// An error, as its one line is shown and logged.
pub fn error_line(error: &dyn std::error::Error) -> String {
    printable(&error.to_string(), ERROR_MAX)
}

/// The first `max` characters of `text`, with a blank for each that is not simply shown.
pub fn printable(text: &str, max: usize) -> String {
    text.chars().take(max).map(|c| if is_shown(c) { c } else { ' ' }).collect()
}

/// Whether a character is shown and does nothing else: no control character (of which escape sequences are made, also
/// those of 8 bits), no line separator, nothing that turns the direction of what follows or that takes no room.
pub fn is_shown(c: char) -> bool {
    !c.is_control()
        && !matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_moves_the_cursor_or_begins_a_line_is_left() {
        let hostile = "a\x1b[2J\u{9b}31m\r\nlevel=error\u{2028}b\u{202e}c\u{200b}\x7f\0d\té";
        let shown = printable(hostile, 100);
        assert_eq!(shown, "a [2J 31m  level=error b c   d é");
    }

    #[test]
    fn no_more_is_kept_than_asked_for() {
        assert_eq!(printable(&"é".repeat(5000), 7), "ééééééé");
    }
}
