#include "sim/image.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <set>
#include <sstream>

namespace llmengine::sim {

namespace {

std::string demangled(const std::string& mangled) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status),
                                                    std::free);
  return status == 0 ? text.get() : mangled;
}

void erase_all(std::string& text, const std::string& part) {
  for (size_t at; (at = text.find(part)) != std::string::npos;) text.erase(at, part.size());
}

// "void llmengine::cuda::(anonymous namespace)::kernel<float, 4>(Arguments)" -> "kernel<float, 4>"
std::string without_signature(std::string name) {
  for (const char* part : {"void ", "(anonymous namespace)::", "llmengine::cuda::", "llmengine::"}) {
    erase_all(name, part);
  }
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (depth == 0 && name[i] == '(') return name.substr(0, i);
  }
  return name;
}

// "kernel<float>(Arguments)::slots" -> "slots"
std::string last_part(const std::string& name) {
  const size_t at = name.rfind("::");
  return at == std::string::npos ? name : name.substr(at + 2);
}

// Of a function's static variable, "_ZZ" <function> "E" <name>: that of the function, where kernels may be.
std::string kernels_function(const std::string& variable) {
  if (!variable.starts_with("_ZZN9llmengine") || variable.starts_with("_ZZN9llmengine3sim")) return {};
  return "_Z" + variable.substr(3);
}

std::string file_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::string output_of(const std::string& command) {
  std::string text;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    std::array<char, 4096> buffer;
    while (const size_t n = fread(buffer.data(), 1, buffer.size(), pipe)) text.append(buffer.data(), n);
    pclose(pipe);
  }
  return text;
}

}  // namespace

const Image& Image::own() {
  static const Image image;
  return image;
}

Image::Image() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&Image::own), &info)) return;
  path_ = info.dli_fname;
  base_ = reinterpret_cast<uintptr_t>(info.dli_fbase);
  dl_iterate_phdr(
      [](dl_phdr_info* object, size_t, void* self) {
        auto& image = *static_cast<Image*>(self);
        std::vector<Segment> segments;
        uintptr_t lowest = UINTPTR_MAX;
        for (int i = 0; i < object->dlpi_phnum; ++i) {
          const ElfW(Phdr) & header = object->dlpi_phdr[i];
          if (header.p_type != PT_LOAD) continue;
          const uintptr_t begin = object->dlpi_addr + header.p_vaddr;
          segments.push_back({begin, begin + header.p_memsz, (header.p_flags & PF_W) != 0});
          lowest = std::min(lowest, begin);
        }
        if (lowest == image.base_) image.segments_ = segments;
        return 0;
      },
      this);
  read_symbols();
}

// Local names are only in .symtab, which the dynamic linker never loads: read it from the file.
void Image::read_symbols() {
  std::ifstream file(std::strchr(path_.c_str(), '/') ? path_ : "/proc/self/exe", std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.size() < sizeof(ElfW(Ehdr))) return;
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(bytes.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(bytes.data() + header->e_shoff);
  const uintptr_t offset = header->e_type == ET_DYN ? base_ : 0;
  std::set<std::string> guarded;
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(bytes.data() + sections[s].sh_offset);
    const char* names = bytes.data() + sections[sections[s].sh_link].sh_offset;
    for (size_t i = 0; i < sections[s].sh_size / sizeof(ElfW(Sym)); ++i) {
      const ElfW(Sym) & symbol = symbols[i];
      if (symbol.st_shndx == SHN_UNDEF) continue;
      const uintptr_t begin = offset + symbol.st_value;
      const std::string name = names + symbol.st_name;
      const int type = symbol.st_info & 15;
      if (type == STT_FUNC) functions_.push_back({begin, name});
      // "_ZGVZ" heads the mangled names of the guards of what functions declare
      if (name.starts_with("_ZGVZ")) guarded.insert("_Z" + name.substr(4));
      const bool zeros = symbol.st_shndx < header->e_shnum && sections[symbol.st_shndx].sh_type == SHT_NOBITS;
      if (type != STT_OBJECT || !zeros || symbol.st_value % kSharedRoom != 0) continue;
      const std::string function = kernels_function(name);
      if (!function.empty()) shared_.push_back({begin, begin + symbol.st_size, name, function});
    }
  }
  std::erase_if(shared_, [&](const SharedVariable& v) { return guarded.count(v.name) > 0; });
  for (SharedVariable& v : shared_) v.name = last_part(demangled(v.name));
  const auto by_begin = [](const auto& a, const auto& b) { return a.begin < b.begin; };
  std::sort(shared_.begin(), shared_.end(), by_begin);
  std::sort(functions_.begin(), functions_.end(), by_begin);
}

// The last entry that begins at or before the address.
template <class Entry>
static const Entry* last_at(const std::vector<Entry>& entries, uintptr_t address) {
  const auto after = std::upper_bound(entries.begin(), entries.end(), address,
                                      [](uintptr_t a, const Entry& e) { return a < e.begin; });
  return after == entries.begin() ? nullptr : &*std::prev(after);
}

const SharedVariable* Image::shared_variable_at(uintptr_t address) const {
  const SharedVariable* variable = last_at(shared_, address);
  return variable && address < variable->begin + kSharedRoom ? variable : nullptr;
}

const Image::Function* Image::function_at(uintptr_t address) const { return last_at(functions_, address); }

size_t Image::static_shared_bytes(uintptr_t kernel) const {
  const Function* function = function_at(kernel);
  size_t bytes = 0;
  for (const SharedVariable& v : shared_) {
    // the rest of the name is "E" and the variable's own
    const bool its =
        function && v.function.starts_with(function->mangled) && v.function[function->mangled.size()] == 'E';
    if (its) bytes += v.end - v.begin;
  }
  return bytes;
}

std::string Image::function_name(uintptr_t address) const {
  const Function* function = function_at(address);
  return function ? without_signature(demangled(function->mangled)) : "kernel";
}

bool Image::is_constant(uintptr_t address) const {
  for (const Segment& s : segments_) {
    if (address >= s.begin && address < s.end) return !s.writable;
  }
  return false;
}

std::string Image::source_line(uintptr_t return_address) const {
  std::ostringstream offset;
  offset << std::hex << "0x" << return_address - 1 - base_;  // one back: into the call itself
  std::istringstream lines(output_of("addr2line -i -e '" + path_ + "' " + offset.str() + " 2>/dev/null"));
  // Innermost first; the shim's own lines say nothing about the kernel.
  for (std::string line; std::getline(lines, line);) {
    if (line.find("csrc/sim/") == std::string::npos && line.find("??") == std::string::npos && !line.empty()) {
      return file_name(line.substr(0, line.find(" (")));
    }
  }
  return file_name(path_) + "+" + offset.str();
}

}  // namespace llmengine::sim
