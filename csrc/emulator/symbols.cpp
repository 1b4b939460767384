#include "symbols.h"

#include <dlfcn.h>
#include <stdio.h>

#include <sstream>

namespace emulator {
namespace {

std::string hexadecimal(uintptr_t number) {
  std::ostringstream text;
  text << std::hex << number;
  return text.str();
}

Dl_info this_library() {
  Dl_info library = {};
  dladdr(reinterpret_cast<void*>(&source_line), &library);
  return library;
}

std::string output_of(const std::string& command) {
  std::string output;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return output;
  char buffer[4096];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) output.append(buffer, n);
  pclose(pipe);
  return output;
}

// addr2line says for each address "0x1a2b", then a line "/path/file.cu:12 (discriminator 3)" for the place
// and each function that it was inlined into.
std::string short_place(const std::string& line) {
  const std::string file = line.substr(line.find_last_of('/') + 1);
  return file.substr(0, file.find(' '));
}

std::string described(const std::vector<std::string>& frames, const std::string& offset) {
  if (frames.empty() || frames.front().find('?') != std::string::npos) return "+" + offset;
  const std::string inner = short_place(frames.front()), outer = short_place(frames.back());
  return inner == outer ? inner : inner + " called in " + outer;
}

}  // namespace

std::vector<std::string> source_lines(const std::vector<uintptr_t>& instructions) {
  if (instructions.empty()) return {};
  const Dl_info library = this_library();
  const uintptr_t base = reinterpret_cast<uintptr_t>(library.dli_fbase);
  std::string command = "addr2line -a -i -e '" + std::string(library.dli_fname) + "'";
  for (uintptr_t address : instructions) command += " 0x" + hexadecimal(address - base);

  std::vector<std::vector<std::string>> frames;
  std::istringstream output(output_of(command + " 2>/dev/null"));
  for (std::string line; std::getline(output, line);) {
    if (line.compare(0, 2, "0x") == 0)
      frames.emplace_back();
    else if (!frames.empty())
      frames.back().push_back(line);
  }
  frames.resize(instructions.size());
  std::vector<std::string> lines;
  for (size_t i = 0; i < instructions.size(); ++i)
    lines.push_back(described(frames[i], hexadecimal(instructions[i] - base)));
  return lines;
}

std::string source_line(uintptr_t instruction) { return source_lines({instruction})[0]; }

std::unordered_set<uintptr_t> guard_variables() {
  std::unordered_set<uintptr_t> offsets;
  std::istringstream output(output_of("nm '" + std::string(this_library().dli_fname) + "' 2>/dev/null"));
  std::string offset, type, name;
  for (std::string line; std::getline(output, line);)
    if (std::istringstream(line) >> offset >> type >> name && name.compare(0, 4, "_ZGV") == 0)
      offsets.insert(std::stoull(offset, nullptr, 16));
  return offsets;
}

}  // namespace emulator
